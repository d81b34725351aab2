"""Writes tiny GGUF models with the gguf library's own writer, and says which weights they hold.

    model = write_gguf(tmp_path / "a.gguf", "llama", kinds={"*": "Q4_0", "output.weight": "F16"})
    model.weights["blk.0.attn_q.weight"]        # as gguf dequantizes it, float32

Quantized tensors are random blocks and not rounded weights: every code occurs, and scales of both
signs, zero and subnormal ones included.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

from torch_q4metal.builtin_model import builtin_gguf
from torch_q4metal.gguf_checkpoint import GgufCheckpoint

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
SPECIAL_KINDS = [3, 3, 3, 4]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@dataclass(frozen=True)
class GgufModel:
    """``weights``: what gguf.dequantize makes of each tensor, under GGUF's names."""

    path: Path
    weights: dict[str, np.ndarray]


def byte_symbols() -> list[str]:
    """The 256 characters that a byte-level BPE writes for bytes, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte if byte in plain else 256 + others.index(byte)) for byte in range(256)]


def default_metadata(arch: str) -> dict[str, Any]:
    """Sizes, and a byte-level tokenizer with a few merges."""
    symbols = byte_symbols()
    merges = ["h e", "l l", "he ll", "hell o", "1 2", "12 3"]
    tokens = SPECIAL + symbols + [merge.replace(" ", "") for merge in merges]
    return {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 512,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": INTERMEDIATE,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{arch}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm" if arch == "llama" else "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": SPECIAL_KINDS + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def tensor_shapes(
    arch: str, vocab: int, tied: bool, biases: str = ""
) -> dict[str, tuple[int, ...]]:
    """GGUF's tensors of a model; ``biases`` of "attention", "mlp" or both are added to a llama."""
    keys = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["output.weight"] = (vocab, HIDDEN)
    for layer in range(LAYERS):
        matrices = {
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (keys, HIDDEN),
            "attn_v": (keys, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (INTERMEDIATE, HIDDEN),
            "ffn_up": (INTERMEDIATE, HIDDEN),
            "ffn_down": (HIDDEN, INTERMEDIATE),
        }
        biased = (
            {"attn_q", "attn_k", "attn_v"} if arch == "qwen2" or "attention" in biases else set()
        )
        biased |= {"attn_output"} if "attention" in biases else set()
        biased |= {"ffn_gate", "ffn_up", "ffn_down"} if "mlp" in biases else set()
        for name, shape in matrices.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
            if name in biased:
                shapes[f"blk.{layer}.{name}.bias"] = shape[:1]
        shapes[f"blk.{layer}.attn_norm.weight"] = shapes[f"blk.{layer}.ffn_norm.weight"] = (HIDDEN,)
    return shapes


def random_tensor(generator: np.random.Generator, shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """Data of one tensor as GGUFWriter takes it: floats, or bytes of blocks."""
    if kind in (Kind.F32, Kind.F16):
        return (generator.standard_normal(shape) * 0.1).astype(
            np.float32 if kind == Kind.F32 else np.float16
        )
    if kind == Kind.BF16:
        return gguf.quantize((generator.standard_normal(shape) * 0.1).astype(np.float32), kind)
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(
        0, 256, (*shape[:-1], shape[-1] // per_block, block_bytes), dtype=np.uint8
    )
    # The leading float16s: scales that a matrix could have, both signs, and the corners.
    for offset in range(0, 4 if kind == Kind.Q4_1 else 2, 2):
        scales = (generator.standard_normal(blocks.shape[:-1]) * 0.01).astype(np.float16)
        corner = generator.integers(0, 8, scales.shape)
        scales[corner == 0] = 0
        scales[corner == 1] = np.float16(6e-8)  # the smallest subnormal
        blocks[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write_gguf(
    path: Path,
    arch: str = "llama",
    *,
    kinds: Mapping[str, str] | None = None,
    tied: bool = True,
    biases: str = "",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    split: int = 1,
    seed: int = 0,
) -> GgufModel:
    """Write a model.

    kinds     pattern of tensor names -> kind of matrices, the last match counts; vectors are F32
    metadata  changes of the metadata; None removes a key
    tensors   further or other tensors (float arrays as they are); None removes one
    split     number of parts; ``path`` is then the first of them and has to be named so
    """
    values = {
        k: v for k, v in (default_metadata(arch) | dict(metadata or {})).items() if v is not None
    }
    tokens = values.get("tokenizer.ggml.tokens") or [""] * 8
    generator = np.random.default_rng(seed)
    content: dict[str, tuple[np.ndarray, Kind]] = {}
    for name, shape in tensor_shapes(arch, len(tokens), tied, biases).items():
        kind = Kind.F32
        for pattern, wanted in (kinds or {"*": "Q4_0"}).items():
            if len(shape) == 2 and fnmatch(name, pattern):
                kind = Kind[wanted]
        content[name] = random_tensor(generator, shape, kind), kind
    for name, data in (tensors or {}).items():
        content.pop(name, None)
        if data is not None:
            content[name] = data, Kind.F16 if data.dtype == np.float16 else Kind.F32

    names = list(content)
    for part in range(split):
        writer = GGUFWriter(part_path(path, part, split), arch)
        if part == 0:
            for key, value in values.items():
                _add(writer, key, value)
        if split > 1:
            writer.add_uint16("split.count", split)
            writer.add_uint16("split.no", part)
        for name in names[part::split]:
            data, kind = content[name]
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    weights = {name: gguf.dequantize(data, kind) for name, (data, kind) in content.items()}
    return GgufModel(path, weights)


def convert_gguf(model: GgufModel | Path, folder: Path, **options: Any) -> dict[str, Any]:
    """Convert into a new ``folder`` and return its config."""
    folder.mkdir()
    path = model if isinstance(model, Path) else model.path
    GgufCheckpoint(path).write(folder, **options)
    return json.loads((folder / "config.json").read_text())


@functools.cache
def smollm2() -> GgufCheckpoint:
    """The real built-in model, its metadata read once: that takes seconds."""
    return GgufCheckpoint(builtin_gguf())


def part_path(path: Path, part: int, split: int) -> Path:
    return path if split == 1 else Path(str(path).replace("-00001-of-", f"-{part + 1:05d}-of-"))


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
