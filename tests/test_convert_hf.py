"""Hugging Face -> MLX: the files that mlx_lm.convert writes, and errors that name what is wrong."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence import assert_one_sentence
from tiny import TinyModel, edit_json, write_tiny

from torch_q4metal.checkpoint import Checkpoint
from torch_q4metal.errors import CheckpointError, ConfigError, Q4MetalError
from torch_q4metal.quantize_checkpoint import QuantizedCheckpoint

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# family, tied, dtype of the source, --dtype, bits, group size; K is 128 and, for down_proj, 192.
CASES = [
    ("llama", True, "float32", None, 4, 64),
    ("llama", False, "bfloat16", None, 3, 32),
    ("llama", False, "float16", "bfloat16", 8, 128),
    ("llama", True, "bfloat16", "float32", 6, 64),
    ("qwen2", False, "float16", None, 2, 64),
    ("qwen2", True, "bfloat16", None, 5, 128),
    ("qwen2", True, "float32", "float16", 4, 32),
]


def write_source(path: Path, family: str, **options: Any) -> TinyModel:
    """A dense checkpoint, with the edge cases of quantization in one of its matrices."""
    options = {"hidden_size": 128, "intermediate_size": 192, **options}
    model = write_tiny(path, family, bits=None, **options)
    name = "model.layers.0.mlp.gate_proj.weight"
    edges = model.tensors[name]
    edges[0], edges[1], edges[2] = 0, 0.25, edges[2].abs()
    edges[3], edges[4], edges[5] = -edges[3].abs(), -0.5, 1e-9
    save_file(model.tensors, path / "model.safetensors", metadata={"format": "pt"})
    return model


def convert(source: Path, folder: Path, **options: Any) -> None:
    folder.mkdir()
    shards = {key: options.pop(key) for key in ("shard_bytes",) if key in options}
    QuantizedCheckpoint(source, **options).write(folder, **shards)


def contents(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """name -> (dtype, shape, bytes) of every tensor in a folder, straight from the files."""
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        raw = file.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:begin])
        assert header.pop("__metadata__") == {"format": "mlx"}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            tensors[name] = entry["dtype"], entry["shape"], raw[begin + first : begin + last]
    return tensors


def assert_same_files(ours: Path, theirs: Path) -> None:
    """All tensors bit for bit, and every JSON file that depends on the model byte for byte."""
    mine, other = contents(ours), contents(theirs)
    assert mine.keys() == other.keys()
    assert [name for name in mine if mine[name] != other[name]] == []
    for name in ("config.json", "model.safetensors.index.json", "generation_config.json"):
        assert (ours / name).read_text() == (theirs / name).read_text(), name
    weights = {file.name for file in theirs.glob("*.safetensors")}
    assert weights == {file.name for file in ours.glob("*.safetensors")}
    # mlx-lm adds a model card, and has transformers write the tokenizer anew.
    theirs_only = {file.name for file in theirs.iterdir()} - {file.name for file in ours.iterdir()}
    assert theirs_only <= {"README.md", "chat_template.jinja"}


@pytest.mark.parametrize(("family", "tied", "source", "dtype", "bits", "group_size"), CASES)
def test_same_files_as_mlx_lm(
    tmp_path: Path,
    family: str,
    tied: bool,
    source: str,
    dtype: str | None,
    bits: int,
    group_size: int,
) -> None:
    from mlx_lm import convert as mlx_convert

    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" and tied else {}
    write_source(tmp_path / "hf", family, tied=tied, dtype=DTYPES[source], **biases)
    convert(tmp_path / "hf", tmp_path / "ours", bits=bits, group_size=group_size, dtype=dtype)
    mlx_convert(
        str(tmp_path / "hf"),
        str(tmp_path / "theirs"),
        quantize=True,
        q_bits=bits,
        q_group_size=group_size,
        dtype=dtype,
    )
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    packed = {name for name, (kind, *_) in contents(tmp_path / "ours").items() if kind == "U32"}
    assert ("model.layers.1.mlp.down_proj.weight" in packed) == (192 % group_size == 0)
    assert ("lm_head.weight" in packed) != tied


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_same_numbers_as_mlx(tmp_path: Path, bits: int, group_size: int, source: str) -> None:
    """Every format: each packed matrix is what mx.quantize makes of the dense one."""
    import mlx.core as mx

    model = write_source(tmp_path / "hf", "llama", layers=1, vocab_size=300, dtype=DTYPES[source])
    convert(tmp_path / "hf", tmp_path / "ours", bits=bits, group_size=group_size)
    tensors = contents(tmp_path / "ours")
    for path in ("model.embed_tokens", "model.layers.0.mlp.gate_proj"):
        dense = model.tensors[f"{path}.weight"]
        weight = mx.array(dense.float().numpy()).astype(getattr(mx, source))
        triple = mx.quantize(weight, group_size=group_size, bits=bits)
        for suffix, expected in zip(("weight", "scales", "biases"), triple, strict=True):
            assert tensors[f"{path}.{suffix}"][2] == bytes(memoryview(expected)), suffix


def test_shards_as_mlx_lm_cuts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx_lm.utils

    class Limit(int):
        """What mlx-lm takes for gigabytes, and shifts."""

        def __lshift__(self, bits: int) -> int:
            return 60_000

    real = mlx_lm.utils.make_shards
    monkeypatch.setattr(mlx_lm.utils, "make_shards", lambda weights: real(weights, Limit()))
    write_source(tmp_path / "hf", "qwen2", tied=False, shards=1)
    mlx_lm.convert(str(tmp_path / "hf"), str(tmp_path / "theirs"), quantize=True)
    convert(tmp_path / "hf", tmp_path / "ours", shard_bytes=60_000)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


def test_pieces_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that is converted in pieces of a few rows comes out as in one."""
    from torch_q4metal import quantize_checkpoint

    write_source(tmp_path / "hf", "qwen2", tied=False)
    convert(tmp_path / "hf", tmp_path / "whole")
    monkeypatch.setattr(quantize_checkpoint, "_PIECE_BYTES", 1500)
    sizes: list[int] = []
    (tmp_path / "pieces").mkdir()
    checkpoint = QuantizedCheckpoint(tmp_path / "hf")
    checkpoint.write(tmp_path / "pieces", sizes.append)
    assert sum(sizes) == checkpoint.total_bytes
    assert max(sizes) <= 1500
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")


def test_sharded_source_and_files_that_come_along(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf", "llama", bits=None, shards=3, index="stale").path
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (source / "chat_template.jinja").write_text("hello")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    write_tiny(tmp_path / "one", "llama", bits=None)
    convert(source, tmp_path / "ours", group_size=32)
    convert(tmp_path / "one", tmp_path / "expected", group_size=32)
    assert contents(tmp_path / "ours") == contents(tmp_path / "expected")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "ours" / name).read_bytes() == (source / name).read_bytes()
    assert (
        tmp_path / "ours" / "additional_chat_templates" / "tool_use.jinja"
    ).read_text() == "tools"
    assert not list((tmp_path / "ours").glob("*.py"))


def test_the_loader_reads_the_result(tmp_path: Path) -> None:
    write_source(tmp_path / "hf", "qwen2", tied=False)
    convert(tmp_path / "hf", tmp_path / "ours", bits=5, group_size=128)
    checkpoint = Checkpoint.open(tmp_path / "ours")
    params = checkpoint.quant_params("lm_head")
    assert params is not None
    assert (params.bits, params.group_size) == (5, 128)
    assert (
        checkpoint.quant_params("model.layers.0.mlp.down_proj") is None
    )  # 192 is not a multiple of 128
    # Nothing that has to be copied because it lies at an odd address.
    assert all(info.begin % info.dtype.itemsize == 0 for info in checkpoint.tensors.values())


@pytest.mark.parametrize("tied", [True, False])
def test_config_that_says_nothing_about_the_head(tmp_path: Path, tied: bool) -> None:
    """mlx-lm takes silence for tied and would drop a head that is there: the files decide."""
    write_source(tmp_path / "hf", "llama", tied=tied, config={"tie_word_embeddings": None})
    convert(tmp_path / "hf", tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config.get("tie_word_embeddings", True) is tied
    assert ("lm_head.scales" in contents(tmp_path / "ours")) is not tied


def test_tied_head_that_is_stored_twice(tmp_path: Path) -> None:
    model = write_source(tmp_path / "hf", "llama", tied=True)
    twice = {**model.tensors, "lm_head.weight": model.tensors["model.embed_tokens.weight"].clone()}
    twice["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    save_file(twice, tmp_path / "hf" / "model.safetensors")
    convert(tmp_path / "hf", tmp_path / "ours")
    names = contents(tmp_path / "ours")
    assert not any("lm_head" in name or "inv_freq" in name for name in names)


# --- errors ---------------------------------------------------------------------------------------


def _change_tensor(name: str, value: torch.Tensor | None, path: Path) -> None:
    """Give a tensor of the source another value, or remove it."""
    file = path / "model.safetensors"
    tensors = {key: t.clone() for key, t in load_file(file).items() if key != name}
    save_file(tensors if value is None else {**tensors, name: value}, file)


def _edit(path: Path, **changes: Any) -> None:
    edit_json(path / "config.json", **changes)


NORM = "model.layers.1.input_layernorm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
BROKEN: list[tuple[Any, list[str]]] = [
    (functools.partial(_edit, model_type="mamba"), ["mamba", "llama and qwen2"]),
    (functools.partial(_edit, model_type=None), ["model_type"]),
    (functools.partial(_edit, num_hidden_layers="two"), ["num_hidden_layers", "two"]),
    (functools.partial(_edit, hidden_size=None), ["hidden_size"]),
    (functools.partial(_edit, num_hidden_layers=3), ["model.layers.2."]),
    (functools.partial(_edit, num_hidden_layers=1), ["model.layers.1."]),
    (functools.partial(_edit, vocab_size=99), ["model.embed_tokens.weight", "99"]),
    (functools.partial(_edit, tie_word_embeddings=False), ["lm_head.weight"]),
    (functools.partial(_edit, quantization={"group_size": 64, "bits": 4}), ["quantized already"]),
    (functools.partial(_edit, quantization_config={"quant_method": "awq"}), ["awq"]),
    (functools.partial(_edit, model_file="evil.py"), ["evil.py"]),
    (functools.partial(_change_tensor, QUERY, None), [QUERY]),
    (functools.partial(_change_tensor, QUERY, torch.zeros(4, 128)), [QUERY, "[4, 128]"]),
    (functools.partial(_change_tensor, NORM, torch.zeros(128, dtype=torch.int32)), [NORM, "int32"]),
    (functools.partial(_change_tensor, "model.odd\x1b.weight", torch.zeros(2)), ["odd"]),
    (lambda path: (path / "config.json").unlink(), ["config.json"]),
    (lambda path: (path / "config.json").write_text("{"), ["config.json"]),
    (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 40), ["model.safetensors"]),
    (lambda path: (path / "model.safetensors").rename(path / "x.bin"), ["x.bin", "safetensors"]),
    (lambda path: (path / "model.safetensors").rename(path / "x.gguf"), ["x.gguf"]),
    (lambda path: (path / "model.safetensors").unlink(), ["safetensors"]),
    (shutil.rmtree, ["hf"]),
]


@pytest.mark.parametrize(("damage", "words"), BROKEN)
def test_broken_sources(tmp_path: Path, damage: Any, words: list[str]) -> None:
    source = write_source(tmp_path / "hf", "llama").path
    damage(source)
    with pytest.raises(Q4MetalError) as error:
        QuantizedCheckpoint(source)
    assert_one_sentence(error.value, *words)


def test_truncated_source(tmp_path: Path) -> None:
    file = write_source(tmp_path / "hf", "llama").path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as error:
        QuantizedCheckpoint(tmp_path / "hf")
    assert_one_sentence(error.value, str(file))


@pytest.mark.parametrize(("bits", "group_size"), [(7, 64), (1, 64), (4, 48), (4, 256)])
def test_formats_that_do_not_exist(tmp_path: Path, bits: int, group_size: int) -> None:
    with pytest.raises(ConfigError) as error:
        QuantizedCheckpoint(tmp_path, bits=bits, group_size=group_size)
    assert_one_sentence(error.value, str(bits), str(group_size))
