"""Writes tiny random checkpoints in MLX's layout, complete with a tokenizer, in a few milliseconds.

    model = write_tiny(tmp_path, "qwen2", tied=False, bits=4, overrides={"lm_head": False})
    model.path, model.config, model.dense["model.norm.weight"]

Written with PyTorch and safetensors only, so that it also runs where MLX does not. ``dense`` holds
the weights that the packed tensors stand for: what another implementation is given for comparison.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from torch_q4metal import reference

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
EOS_ID = 256 + SPECIAL_TOKENS.index("<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}

Override = Mapping[str, int] | bool


@dataclass(frozen=True)
class TinyModel:
    """A written checkpoint: ``tensors`` as in the file (uint32 as int32), ``dense`` dequantized."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    dense: dict[str, Tensor]


def write_tiny(
    path: Path,
    family: str = "llama",
    *,
    tied: bool = True,
    bits: int | None = 4,
    group_size: int = 32,
    overrides: Mapping[str, Override] | None = None,
    dtype: torch.dtype = torch.float32,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab_size: int = VOCAB_SIZE,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    shards: int = 1,
    index: str = "fresh",
    nested: bool = False,
    tokenizer: bool = True,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> TinyModel:
    """Write a model directory ``path`` (created if needed) and return what it holds.

    family      "llama", "qwen2", "qwen3" or "mistral"
    bits        None: a dense checkpoint without ``quantization``
    overrides   module path -> {"bits": .., "group_size": ..} or False (dense), as in the config
    index       "fresh", "missing" or "stale" (names shards that do not exist)
    nested      names under ``language_model.``, config under ``text_config``, and a vision tower
    config      further fields of config.json; None as a value removes a field

    A matrix whose K is no multiple of the group size stays dense, as MLX leaves it.
    """
    path.mkdir(parents=True, exist_ok=True)
    head_dim = head_dim or hidden_size // heads
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if family == "llama":
        values |= {"attention_bias": attention_bias, "mlp_bias": mlp_bias}
    if family == "qwen2" and head_dim == hidden_size // heads:
        del values["head_dim"]  # real Qwen2 configs have none
    if family == "mistral":
        values["sliding_window"] = None
    if bits is not None:
        entry = {"group_size": group_size, "bits": bits, "mode": "affine"}
        entry |= {
            name: dict(v) if isinstance(v, Mapping) else v for name, v in (overrides or {}).items()
        }
        values |= {"quantization": entry, "quantization_config": entry}
    values |= config or {}
    values = {
        key: value
        for key, value in values.items()
        if key not in (config or {}) or value is not None
    }

    generator = torch.Generator().manual_seed(seed)
    source = _random_weights(values, family, tied, head_dim, attention_bias, mlp_bias, generator)
    tensors: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, value in source.items():
        value = value.to(dtype)
        module = name.removesuffix(".weight")
        override = (overrides or {}).get(module, True)
        params = (bits, group_size)
        if isinstance(override, Mapping):
            params = (override.get("bits", 4), override.get("group_size", 64))
        if bits is None or value.ndim == 1 or override is False or value.shape[1] % params[1]:
            tensors[name] = dense[name] = value
            continue
        weight, scales, biases = reference.quantize(value, group_size=params[1], bits=params[0])
        tensors |= {
            f"{module}.weight": weight,
            f"{module}.scales": scales,
            f"{module}.biases": biases,
        }
        dense[name] = reference.dequantize(
            weight, scales, biases, group_size=params[1], bits=params[0]
        )

    if nested:
        prefixed = {f"language_model.{name}": value for name, value in tensors.items()}
        write_shards(path, prefixed | {"vision_tower.weight": torch.zeros(2, 2)}, shards, index)
        outer = {
            "model_type": "mistral3",
            "text_config": values,
            "vision_config": {"hidden_size": 2},
        }
        write_json(path / "config.json", outer)
    else:
        write_shards(path, tensors, shards, index)
        write_json(path / "config.json", values)
    write_json(
        path / "generation_config.json", {"eos_token_id": [EOS_ID, 256], "bos_token_id": 256}
    )
    if tokenizer:
        write_tokenizer(path)
    return TinyModel(path, values, tensors, dense)


def write_shards(
    path: Path, tensors: Mapping[str, Tensor], shards: int = 1, index: str = "fresh"
) -> None:
    """Deal the tensors out in order; int32 tensors are written as the uint32 that MLX writes."""
    weight_map: dict[str, str] = {}
    names = list(tensors)
    size = -(-len(names) // shards)
    for i in range(shards):
        file = (
            "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        )
        part = {
            name: tensors[name].view(torch.uint32)
            if tensors[name].dtype == torch.int32
            else tensors[name]
            for name in names[i * size : (i + 1) * size]
        }
        save_file(part, path / file, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(part, file)
    if index == "stale":
        weight_map = dict.fromkeys(weight_map, "model-00001-of-00009.safetensors")
    if index != "missing":
        total = sum(value.nbytes for value in tensors.values())
        content = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(path / "model.safetensors.index.json", content)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False))


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level fields of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    write_json(path, {key: item for key, item in value.items() if item is not None})


def write_tokenizer(path: Path) -> None:
    """tokenizer.json of a byte-level BPE without merges (id = byte), with ChatML's tokens."""
    vocab = {_byte_symbol(byte): byte for byte in range(256)}
    added = [
        {
            "id": 256 + i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, token in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [],
        },
    }
    write_json(path / "tokenizer.json", tokenizer)
    settings = {
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[3],
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(path / "tokenizer_config.json", settings)


@functools.cache
def _byte_symbol(byte: int) -> str:
    """The printable character that byte-level BPE writes for a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + sum(other not in printable for other in range(byte)))


def _random_weights(
    config: Mapping[str, Any],
    family: str,
    tied: bool,
    head_dim: int,
    attention_bias: bool,
    mlp_bias: bool,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """All weights in f32 under MLX's names, scaled so that activations keep their size."""
    hidden, inner, vocab = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    queries, keys = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    weights: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = False) -> None:
        weights[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * columns**-0.5
        if bias:
            weights[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.5

    def norm(name: str, size: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(size, generator=generator)

    linear("model.embed_tokens", vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        norm(f"{block}.input_layernorm", hidden)
        qkv_bias = attention_bias or family == "qwen2"
        linear(f"{block}.self_attn.q_proj", queries, hidden, qkv_bias)
        linear(f"{block}.self_attn.k_proj", keys, hidden, qkv_bias)
        linear(f"{block}.self_attn.v_proj", keys, hidden, qkv_bias)
        linear(f"{block}.self_attn.o_proj", hidden, queries, attention_bias)
        if family == "qwen3":
            norm(f"{block}.self_attn.q_norm", head_dim)
            norm(f"{block}.self_attn.k_norm", head_dim)
        norm(f"{block}.post_attention_layernorm", hidden)
        linear(f"{block}.mlp.gate_proj", inner, hidden, mlp_bias)
        linear(f"{block}.mlp.up_proj", inner, hidden, mlp_bias)
        linear(f"{block}.mlp.down_proj", hidden, inner, mlp_bias)
    norm("model.norm", hidden)
    if not tied:
        linear("lm_head", vocab, hidden)
    return weights
