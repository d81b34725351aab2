"""Reads and checks the header of one safetensors file: which tensors lie at which bytes.

A file starts with the header's length (uint64, little-endian), then the header (a JSON object),
then the tensors' bytes. Files come from strangers, so every number is checked before anything
relies on it: a header that passes describes ranges that lie inside the file, do not overlap, reach
its end, and have as many bytes as dtype and shape ask for.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_MAX_DIMENSIONS = 64
_MAX_PADDING = 1 << 16  # between tensors, for writers that align them to pages


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes ``[begin, end)`` of ``file``, counted from the file's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def loaded_dtype(self) -> torch.dtype:
        """The file's, but int32 for uint32, with the same bits: torch can neither shift nor pickle
        that.
        """
        return torch.int32 if self.dtype == torch.uint32 else self.dtype


def printable(name: str) -> str:
    """A name from a file, fit for a one-line message: no control characters, not endless."""
    short = name if len(name) <= 120 else name[:117] + "..."
    return short if short.isprintable() and short else repr(short)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """All tensors of one file, sorted by position. Raises CheckpointError naming file or tensor."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            begin, entries = _read_entries(stream, size, file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from None
    infos = [_tensor_info(name, entry, file, begin) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.begin, info.end))
    _check_coverage(infos, file, begin, size)
    return {info.name: info for info in infos}


def _read_entries(stream: BinaryIO, size: int, file: Path) -> tuple[int, dict[str, Any]]:
    """(first byte of the data, the header's entries without ``__metadata__``)."""
    if size < 8:
        raise CheckpointError(
            f"{file} has {size} bytes, too few for a safetensors file; download it again."
        )
    length = int.from_bytes(stream.read(8), "little")
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{file} says that its header has {length} bytes, but the file has {size}; "
            "it is truncated or no safetensors file."
        )
    try:
        entries = json.loads(stream.read(length).decode(), object_pairs_hook=_unique_object)
    except RecursionError:
        raise CheckpointError(f"{file} has a damaged header: it is nested too deeply.") from None
    except ValueError as error:  # no UTF-8, no JSON, or an integer with thousands of digits
        reason = printable(str(error).splitlines()[0])
        raise CheckpointError(f"{file} has a damaged header: {reason}.") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file} has a damaged header: it is not a JSON object.")
    entries.pop("__metadata__", None)
    return 8 + length, entries


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        name, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{printable(name)} appears twice")
    return result


def _tensor_info(name: str, entry: Any, file: Path, data_begin: int) -> TensorInfo:
    where = f"{file}: tensor {printable(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} has a damaged header entry.")
    dtype_name: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise CheckpointError(f"{where} has dtype {_short(dtype_name)}, which is not known.")
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{where} has shape {_short(shape)}, which is no list of sizes.")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where} has data_offsets {_short(offsets)}, which is no begin and end."
        )
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"{where} has {offsets[1] - offsets[0]} bytes, but {dtype_name} {_short(shape)} "
            f"needs {_short(needed)}."
        )
    begin, end = data_begin + offsets[0], data_begin + offsets[1]
    return TensorInfo(name, dtype, tuple(shape), file, begin, end)


def _check_coverage(infos: list[TensorInfo], file: Path, begin: int, size: int) -> None:
    """The tensors follow each other from ``begin`` to the file's end, with padding at most.

    The end is exact: a header length that is too small by a few spaces would shift every tensor.
    """
    position = begin
    for info in infos:
        if info.end > size:
            raise CheckpointError(
                f"{file}: tensor {printable(info.name)} ends at byte {info.end}, but the file has "
                f"{size}; the file is truncated."
            )
        if info.begin < position:
            raise CheckpointError(
                f"{file}: tensor {printable(info.name)} begins at byte {info.begin}, inside the "
                f"tensor before it, which ends at {position}."
            )
        if info.begin > position + _MAX_PADDING:
            raise CheckpointError(
                f"{file}: bytes {position} to {info.begin}, before tensor {printable(info.name)}, "
                "belong to no tensor."
            )
        position = info.end
    if position != size:
        raise CheckpointError(
            f"{file} has {size} bytes, but its header accounts for {position}; it is damaged."
        )


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 63 for i in value
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
