"""Writes safetensors shards and their index in the layout of an MLX checkpoint, piece by piece.

Sizes are known before any byte is: the headers go first, then every tensor's bytes land at their
final place in whatever order they are made, so that memory holds one piece of one tensor, no more.

Layout: ``model.safetensors``, or ``model-00001-of-00003.safetensors`` ... of at most
``SHARD_BYTES`` each; ``{"format": "mlx"}`` as metadata; always a ``model.safetensors.index.json``.
MLX orders the data of a shard by hash table and does not pad its header. Here tensors lie in the
order of the model, and the header is padded so that the data can be mapped and used in place.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from .errors import CheckpointError

SHARD_BYTES = 5 << 30
ALIGNMENT = 64  # a cache line: more than any dtype or vector load asks for
ITEM_BYTES = {"U32": 4, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written: name, safetensors dtype, shape, and the parameters it counts for.

    ``parameters`` is the number of weights of the model that the tensor stands for: None for its
    number of elements; ``N * K`` for a packed weight; 0 for scales and biases.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameters: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def packed_specs(
    path: str, rows: int, columns: int, *, bits: int, group_size: int, dtype: str
) -> list[TensorSpec]:
    """The three tensors of a quantized matrix ``[rows, columns]`` at ``path``, in MLX's order."""
    groups = (rows, columns // group_size)
    return [
        TensorSpec(f"{path}.weight", "U32", (rows, columns * bits // 32), rows * columns),
        TensorSpec(f"{path}.scales", dtype, groups, 0),
        TensorSpec(f"{path}.biases", dtype, groups, 0),
    ]


def plan_shards(
    tensors: Iterable[TensorSpec], shard_bytes: int = SHARD_BYTES
) -> list[list[TensorSpec]]:
    """Fill shards greedily in order, as mlx-lm does; a tensor above the limit has its own shard."""
    shards: list[list[TensorSpec]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards or [[]]


class ShardWriter:
    """Context manager that writes the given tensors into ``folder``, which exists.

    ``write`` may be called in any order; leaving the block without an error checks that every byte
    was written, then writes the index. ``progress`` is called with the size of each piece in bytes.

    Raises CheckpointError when the disk is too small, OSError when writing fails all the same.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[TensorSpec],
        shard_bytes: int = SHARD_BYTES,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.folder = folder
        self.total_bytes = sum(tensor.nbytes for tensor in tensors)
        self._specs = {tensor.name: tensor for tensor in tensors}
        if len(self._specs) != len(tensors):
            raise ValueError("a tensor name was given twice")
        self._shards = plan_shards(tensors, shard_bytes)
        self._progress = progress
        self._files: list[IO[bytes]] = []
        self._places: dict[str, tuple[int, int]] = {}  # name -> (shard, offset in its file)
        self._missing = {tensor.name: tensor.nbytes for tensor in tensors}
        free = shutil.disk_usage(folder).free
        if free < self.total_bytes:
            raise CheckpointError(
                f"{folder.parent} has {_gigabytes(free)} free and the converted model needs "
                f"{_gigabytes(self.total_bytes)}: make room or name another folder."
            )

    def shard_name(self, index: int) -> str:
        count = len(self._shards)
        if count == 1:
            return "model.safetensors"
        return f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def __enter__(self) -> "ShardWriter":
        for index, shard in enumerate(self._shards):
            header = _header(shard)
            offset = len(header)
            for tensor in shard:
                self._places[tensor.name] = (index, offset)
                offset += tensor.nbytes
            self._files.append(open(self.folder / self.shard_name(index), "xb"))
            self._put(index, 0, header)
        return self

    def write(self, name: str, data: np.ndarray, offset: int = 0) -> None:
        """Write the bytes of ``data`` at byte ``offset`` of tensor ``name``."""
        content = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if offset + content.nbytes > self._specs[name].nbytes:
            raise ValueError(f"{name}: {content.nbytes} bytes at {offset} exceed its size")
        shard, begin = self._places[name]
        self._put(shard, begin + offset, content.data)
        self._missing[name] -= content.nbytes
        if self._progress is not None:
            self._progress(content.nbytes)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for file in self._files:
                file.close()

    def _put(self, shard: int, offset: int, content: bytes | memoryview) -> None:
        self._files[shard].seek(offset)
        self._files[shard].write(content)

    def _finish(self) -> None:
        for name, missing in self._missing.items():
            if missing:
                raise ValueError(f"{name}: {missing} bytes were not written")
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        names = {
            tensor.name: self.shard_name(index)
            for index, shard in enumerate(self._shards)
            for tensor in shard
        }
        parameters = sum(
            math.prod(tensor.shape) if tensor.parameters is None else tensor.parameters
            for tensor in self._specs.values()
        )
        index = {
            "metadata": {"total_size": self.total_bytes, "total_parameters": parameters},
            "weight_map": dict(sorted(names.items())),
        }
        path = self.folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=4), encoding="utf-8")


def _header(tensors: Iterable[TensorSpec]) -> bytes:
    """Length and JSON header of one shard, padded with blanks to ``ALIGNMENT``."""
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
