"""Bytes of weight files in memory: mapped, only the ranges that somebody wants; or read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError
from .safetensors_header import TensorInfo

_PIECE = 64 << 20  # bytes between two looks at Ctrl-C


@dataclass(frozen=True)
class MappedBytes:
    """Bytes of a file from ``begin`` on, in memory."""

    memory: mmap.mmap
    begin: int

    @property
    def end(self) -> int:
        return self.begin + len(self.memory)


def byte_ranges(infos: Iterable[TensorInfo]) -> list[tuple[int, int]]:
    """(begin, end) of what the tensors take of their file, in order; near neighbours joined.

    Begins are rounded down to what can be mapped.
    """
    ranges: list[tuple[int, int]] = []
    for begin, end in sorted((info.begin, info.end) for info in infos if info.nbytes):
        begin -= begin % mmap.ALLOCATIONGRANULARITY
        if ranges and begin <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], max(end, ranges[-1][1])
        else:
            ranges.append((begin, end))
    return ranges


def map_ranges(file: Path, ranges: list[tuple[int, int]]) -> list[MappedBytes]:
    """Maps these bytes of ``file``, privately. Raises CheckpointError if it cannot be done."""
    try:
        with file.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size < ranges[-1][1]:
                raise _shortened(file)
            return [
                MappedBytes(
                    mmap.mmap(stream.fileno(), end - begin, access=mmap.ACCESS_COPY, offset=begin),
                    begin,
                )
                for begin, end in ranges
            ]
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be mapped into memory: {error}.") from None


def read_tensor(info: TensorInfo) -> Tensor:
    """The bytes of a tensor, read. Through the mapping they would be in memory twice."""
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    read_bytes(info.file, info.begin, raw.numpy().data)
    return raw


def read_bytes(file: Path, begin: int, view: memoryview) -> None:
    """Fills ``view`` from a file. Raises CheckpointError if it cannot be read or is too short."""
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(begin)
            while view:
                count = stream.readinto(view[:_PIECE])
                if not count:
                    raise _shortened(file)
                view = view[count:]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from None


def _shortened(file: Path) -> CheckpointError:
    return CheckpointError(f"{file} became shorter while it was being loaded.")
