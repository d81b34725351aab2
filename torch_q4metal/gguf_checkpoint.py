"""GGUF -> MLX checkpoint, without changing any weight's value.

Q4_0, Q4_1 and Q8_0 matrices become packed matrices of group size 32 (``gguf_blocks``); F16, BF16
and F32 tensors are copied. Where kinds are mixed, config.json gets an entry for each module that
differs from the most common kind. Architectures: llama and qwen2.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.gguf_reader import ReaderTensor

from .errors import CheckpointError
from .gguf_blocks import BLOCK_TYPES, GROUP_SIZE
from .gguf_config import architecture, generation_config, model_config, model_sizes
from .gguf_file import GgufFile, printable
from .gguf_tokenizer import write_tokenizer
from .model_layout import ModelSizes, ModuleSpec, model_modules
from .safetensors_writer import SHARD_BYTES, ShardWriter, TensorSpec, packed_specs

FLOAT_TYPES = ("F32", "F16", "BF16")
_PIECE_BYTES = 32 << 20  # source bytes converted at a time: what a conversion needs of memory
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
# rope_freqs is read with the config; the rotation tables of old files follow from it.
_NOT_WEIGHTS = ("rope_freqs.weight", "attn_rot_embd.weight")


@dataclass(frozen=True)
class _Part:
    """A weight or bias of one module: where it comes from and how its rows are to be ordered."""

    name: str
    source: ReaderTensor
    order: np.ndarray | None  # row indices, None for as they are

    @property
    def kind(self) -> str:
        return str(self.source.tensor_type.name)

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) of the source data: uint8 blocks, or bytes of floats."""
        rows = self.source.data.reshape(int(self.source.shape[-1]), -1).view(np.uint8)
        step = max(1, _PIECE_BYTES // rows.shape[1])
        for begin in range(0, rows.shape[0], step):
            end = min(begin + step, rows.shape[0])
            yield begin, rows[begin:end] if self.order is None else rows[self.order[begin:end]]


class GgufCheckpoint:
    """A GGUF file seen as an MLX checkpoint: its contents are known before any weight is read.

    Raises CheckpointError, ConfigError or TokenizerError, naming the tensor or key, for all that is
    missing, damaged or not built.
    """

    def __init__(self, path: Path) -> None:
        self.file = GgufFile(path)
        self.sizes: ModelSizes = model_sizes(self.file)
        self.config = model_config(self.file, self.sizes)
        self.parts = list(_parts(self.file, self.sizes))
        _check_nothing_left(self.file, self.parts)
        self.tensors = [spec for part in self.parts for spec in _specs(part)]
        quantization = _quantization(self.parts)
        if quantization is not None:
            self.config["quantization"] = self.config["quantization_config"] = quantization

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of the converted checkpoint."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def write(
        self,
        folder: Path,
        progress: Callable[[int], None] | None = None,
        *,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Write the whole checkpoint into ``folder``; ``progress`` gets the size of each piece."""
        _write_json(folder / "config.json", dict(sorted(self.config.items())))
        _write_json(folder / "generation_config.json", generation_config(self.file))
        write_tokenizer(self.file, folder, self.config["max_position_embeddings"])
        with ShardWriter(folder, self.tensors, shard_bytes, progress) as writer:
            for part in self.parts:
                _convert(part, writer)


def _parts(file: GgufFile, sizes: ModelSizes) -> Iterator[_Part]:
    permuted = architecture(file) == "llama"  # its rotary pairs are stored side by side
    for module in model_modules(sizes):
        order = None
        if permuted and module.path.endswith((".q_proj", ".k_proj")):
            order = _half_split_rows(module.shape[0], sizes.head_dim)
        for suffix, shape in (("weight", module.shape), ("bias", module.shape[:1])):
            if suffix == "bias" and not module.bias:
                continue
            source = _find(file, module, suffix, shape)
            yield _Part(f"{module.path}.{suffix}", source, order)


def _half_split_rows(rows: int, head_dim: int) -> np.ndarray:
    """Row order that puts GGUF's rotary pairs (2i, 2i + 1) back to (i, i + head_dim / 2)."""
    return np.arange(rows).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _find(file: GgufFile, module: ModuleSpec, suffix: str, shape: tuple[int, ...]) -> ReaderTensor:
    name = f"{_gguf_name(module.path)}.{suffix}"
    source = file.tensors.get(name)
    if source is None:
        raise CheckpointError(f"{file.path} lacks the tensor {name}.")
    kind = source.tensor_type.name
    if kind not in FLOAT_TYPES and (kind not in BLOCK_TYPES or len(shape) != 2):
        raise CheckpointError(
            f"{file.path}: {name} has the type {kind}: without changing its values only"
            f" {', '.join(BLOCK_TYPES)} and {', '.join(FLOAT_TYPES)} can be converted"
            " (llama-quantize --pure makes files of one type)."
        )
    found = tuple(int(size) for size in reversed(source.shape))
    if found != shape:
        raise CheckpointError(
            f"{file.path}: {name} has the shape {list(found)} and the metadata ask for"
            f" {list(shape)}."
        )
    return source


def _gguf_name(path: str) -> str:
    if path in _OUTER_NAMES:
        return _OUTER_NAMES[path]
    layer, _, inner = path.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[inner]}"


def _check_nothing_left(file: GgufFile, parts: list[_Part]) -> None:
    used = {part.source.name for part in parts}
    left = [name for name in file.tensors if name not in used and not name.endswith(_NOT_WEIGHTS)]
    if left:
        more = " ..." if len(left) > 5 else ""
        raise CheckpointError(
            f"{file.path} has tensors that the {architecture(file)} family does not know:"
            f" {', '.join(map(printable, left[:5]))}{more}."
        )


def _specs(part: _Part) -> list[TensorSpec]:
    shape = tuple(int(size) for size in reversed(part.source.shape))
    block = BLOCK_TYPES.get(part.kind)
    if block is None:
        return [TensorSpec(part.name, part.kind, shape)]
    path = part.name.removesuffix(".weight")
    return packed_specs(path, *shape, bits=block.bits, group_size=GROUP_SIZE, dtype="F16")


def _convert(part: _Part, writer: ShardWriter) -> None:
    block = BLOCK_TYPES.get(part.kind)
    for begin, rows in part.pieces():
        if block is None:
            writer.write(part.name, rows, begin * rows.shape[1])
            continue
        path = part.name.removesuffix(".weight")
        for suffix, data in zip(("weight", "scales", "biases"), block.unpack(rows), strict=True):
            if suffix != "weight" and not np.isfinite(data).all():
                raise CheckpointError(
                    f"the {suffix} of {part.source.name} are not finite in float16:"
                    " the file is damaged, or its weights are beyond any model's."
                )
            writer.write(f"{path}.{suffix}", data, begin * data.shape[1] * data.itemsize)


def _quantization(parts: list[_Part]) -> dict[str, Any] | None:
    """The quantization section: the kind with most weights, and one entry for each other module."""
    matrices = [part for part in parts if len(part.source.shape) == 2]
    weights: Counter[int] = Counter()
    for part in matrices:
        if part.kind in BLOCK_TYPES:
            weights[BLOCK_TYPES[part.kind].bits] += int(part.source.n_elements)
    if not weights:
        return None
    default = _parameters(weights.most_common(1)[0][0])
    section: dict[str, Any] = dict(default)
    for part in matrices:
        block = BLOCK_TYPES.get(part.kind)
        own = False if block is None else _parameters(block.bits)
        if own != default:
            section[part.name.removesuffix(".weight")] = own
    return section


def _parameters(bits: int) -> dict[str, Any]:
    return {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8")
