"""GGUF -> MLX: every weight keeps its value, in the layout that MLX's own loader takes."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import HEADS, HIDDEN, KV_HEADS, SPECIAL, convert_gguf, smollm2, write_gguf
from safetensors.torch import load_file

from torch_q4metal import gguf_checkpoint

HEAD_DIM = HIDDEN // HEADS
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def mlx_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.{parts[3]}"
    return f"{NAMES[parts[0]]}.{parts[1]}"


def half_split(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k of a llama file, in the order in which Hugging Face and MLX have them.

    Row by row: value i of a head's first half is row 2 i of the head, of its second half 2 i + 1.
    """
    result = np.empty_like(rows)
    for head in range(0, len(rows), head_dim):
        for i in range(head_dim // 2):
            result[head + i] = rows[head + 2 * i]
            result[head + head_dim // 2 + i] = rows[head + 2 * i + 1]
    return result


def dense(tensors: dict[str, torch.Tensor], config: dict[str, Any], name: str) -> np.ndarray:
    """The float32 values of a converted tensor, packed as the config says: scale * code + bias."""
    path = name.removesuffix(".weight")
    if f"{path}.scales" not in tensors or name.endswith(".bias"):
        return tensors[name].float().numpy()
    entry = config["quantization"].get(path, config["quantization"])
    codes = tensors[name].numpy().view(np.uint8)
    if entry["bits"] == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)  # the lower half of a byte comes first
    scales, biases = (
        tensors[f"{path}.{kind}"].float().numpy()[..., None] for kind in ("scales", "biases")
    )
    groups = codes.reshape(*scales.shape[:2], entry["group_size"]).astype(np.float32)
    return (scales * groups + biases).reshape(len(codes), -1)


def assert_same_values(
    weights: dict[str, np.ndarray], folder: Path, config: dict[str, Any], head_dim: int = HEAD_DIM
) -> None:
    tensors = load_file(folder / "model.safetensors")
    permuted = config["model_type"] == "llama"
    for name, expected in weights.items():
        if permuted and (".attn_q." in name or ".attn_k." in name):
            expected = half_split(expected, head_dim)
        assert np.array_equal(dense(tensors, config, mlx_name(name)), expected), name
    packed = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    others = {name for name in tensors if not name.endswith((".scales", ".biases"))}
    assert others == {mlx_name(name) for name in weights}
    assert {f"{path}.weight" for path in packed} <= others


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16", "F32"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_values_are_unchanged(tmp_path: Path, arch: str, kind: str, tied: bool) -> None:
    model = write_gguf(tmp_path / "a.gguf", arch, kinds={"*": kind}, tied=tied)
    config = convert_gguf(model, tmp_path / "out")
    assert config["tie_word_embeddings"] == tied
    assert_same_values(model.weights, tmp_path / "out", config)
    if kind in ("F16", "BF16", "F32"):
        assert "quantization" not in config
        weight = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
        assert (
            weight.dtype
            == {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[kind]
        )
    else:
        expected = {"group_size": 32, "bits": 8 if kind == "Q8_0" else 4, "mode": "affine"}
        assert config["quantization"] == config["quantization_config"] == expected


def test_mixed_types_become_overrides(tmp_path: Path) -> None:
    kinds = {
        "*": "Q4_0",
        "*ffn_down*": "Q8_0",
        "blk.1.attn_v*": "Q4_1",
        "token_embd*": "BF16",
        "output.*": "F16",
    }
    model = write_gguf(tmp_path / "a.gguf", "qwen2", kinds=kinds, tied=False)
    config = convert_gguf(model, tmp_path / "out")
    assert_same_values(model.weights, tmp_path / "out", config)
    eight = {"group_size": 32, "bits": 8, "mode": "affine"}
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.embed_tokens": False,
        "lm_head": False,
        "model.layers.0.mlp.down_proj": eight,
        "model.layers.1.mlp.down_proj": eight,
    }


@pytest.mark.parametrize("biases", ["attention", "mlp", "attention mlp"])
def test_biases_of_llama(tmp_path: Path, biases: str) -> None:
    model = write_gguf(tmp_path / "a.gguf", biases=biases)
    config = convert_gguf(model, tmp_path / "out")
    assert config["attention_bias"] == ("attention" in biases)
    assert config["mlp_bias"] == ("mlp" in biases)
    assert_same_values(model.weights, tmp_path / "out", config)


def test_parts_and_shards(tmp_path: Path) -> None:
    """A model in three parts gives what it gives in one file; small shards hold the same."""
    one = convert_gguf(write_gguf(tmp_path / "a.gguf", tied=False), tmp_path / "one")
    parts = write_gguf(tmp_path / "a-00001-of-00003.gguf", tied=False, split=3)
    assert convert_gguf(parts, tmp_path / "parts") == one
    whole = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == whole
    sizes: list[int] = []
    convert_gguf(parts, tmp_path / "shards", progress=sizes.append, shard_bytes=20_000)
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    tensors = {name: value for shard in shards for name, value in load_file(shard).items()}
    expected = load_file(tmp_path / "one" / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == sum(t.nbytes for t in expected.values())
    assert index["weight_map"].keys() == expected.keys()


def test_pieces_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that is converted in pieces of a few rows comes out as in one."""
    kinds = {"*": "Q4_1", "token_embd*": "Q8_0", "*ffn_down*": "F16"}
    model = write_gguf(tmp_path / "a.gguf", kinds=kinds, biases="attention")
    convert_gguf(model, tmp_path / "whole")
    monkeypatch.setattr(gguf_checkpoint, "_PIECE_BYTES", 300)
    sizes: list[int] = []
    convert_gguf(model, tmp_path / "pieces", progress=sizes.append)
    assert max(sizes) <= 300
    first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "pieces"))
    assert first.read_bytes() == second.read_bytes()


LOADED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"biases": "attention mlp", "kinds": {"*": "Q4_1", "*ffn*": "Q8_0"}}),
    ("llama", {"tied": False, "kinds": {"*": "Q4_0", "token_embd*": "F16", "*ffn_down*": "BF16"}}),
    ("qwen2", {"tied": False, "kinds": {"*": "Q8_0", "output*": "Q4_1"}}),
    ("qwen2", {"kinds": {"*": "F32"}}),
]


@pytest.mark.parametrize(("arch", "options"), LOADED)
def test_both_loaders_take_the_result(tmp_path: Path, arch: str, options: dict[str, Any]) -> None:
    """mlx-lm's strict loader finds every tensor and no other; MLX and we then compute the same."""
    import mlx.core as mx
    from mlx_lm.utils import load_model as mlx_load_model

    from torch_q4metal.models import load_model

    convert_gguf(write_gguf(tmp_path / "a.gguf", arch, **options), tmp_path / "out")
    ids = torch.tensor([[4, 70, 12, 7, 260]])
    oracle, _ = mlx_load_model(tmp_path / "out")
    oracle.set_dtype(mx.float32)
    expected = torch.tensor(np.array(oracle(mx.array(ids.numpy()))))
    logits = load_model(tmp_path / "out", dtype=torch.float32)(ids)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_data_can_be_used_in_place(tmp_path: Path) -> None:
    convert_gguf(write_gguf(tmp_path / "a.gguf"), tmp_path / "out")
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert (8 + length) % 64 == 0
    assert header.pop("__metadata__") == {"format": "mlx"}
    assert all(entry["data_offsets"][0] % 4 == 0 for entry in header.values())


# --- the real model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and config of the converted built-in model."""
    folder = tmp_path_factory.mktemp("smollm2")
    smollm2().write(folder)
    return folder, json.loads((folder / "config.json").read_text())


def test_smollm2_values(converted: tuple[Path, dict[str, Any]]) -> None:
    folder, config = converted
    source = smollm2().file.tensors
    weights = {name: gguf.dequantize(t.data, t.tensor_type) for name, t in source.items()}
    assert sum(weight.size for weight in weights.values()) == 134_515_008
    assert_same_values(weights, folder, config, head_dim=64)


def test_smollm2_config(converted: tuple[Path, dict[str, Any]]) -> None:
    folder, config = converted
    section = {"group_size": 32, "bits": 4, "mode": "affine"}
    section["model.embed_tokens"] = {"group_size": 32, "bits": 8, "mode": "affine"}
    assert config == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 1, "eos_token_id": [2, 0],
        "quantization": section, "quantization_config": section,
    }  # fmt: skip
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}
    assert "<|im_start|>assistant" in (folder / "chat_template.jinja").read_text()
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["bos_token"] == "<|im_start|>"
    assert tokenizer["eos_token"] == "<|im_end|>"


def test_smollm2_knows_the_capital_of_france(converted: tuple[Path, dict[str, Any]]) -> None:
    """MLX runs the converted model: a wrong row order or nibble order would end in babble."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model
    from tokenizers import Tokenizer

    folder, _ = converted
    model, _ = load_model(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    prompt = mx.array(tokenizer.encode(question).ids)
    ids = [int(token) for token, _ in generate_step(prompt, model, max_tokens=9)]
    assert "Paris" in tokenizer.decode(ids)


def test_row_counts() -> None:
    """Nothing is symmetric by accident here: q and k differ, so do heads and rotary pairs."""
    assert HEADS != KV_HEADS
    assert HEAD_DIM // 2 != HEADS
    assert len(SPECIAL) == 4
