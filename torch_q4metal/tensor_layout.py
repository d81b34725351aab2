"""Where a checkpoint's tensors go in the memory that they are read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .safetensors_header import TensorInfo

_ALIGNMENT = 256  # of tensors: whole cache lines; kernels load 16 bytes at a time on a GPU


@dataclass(frozen=True)
class Place:
    """Where a tensor goes: to byte ``begin`` of buffer number ``buffer``."""

    info: TensorInfo
    buffer: int
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.info.nbytes


def aligned(size: int) -> int:
    """Bytes that so many take with what follows them aligned."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def arrange(infos: Mapping[str, TensorInfo], limit: int | None = None) -> dict[str, Place]:
    """Places by name, in the order of the files.

    ``limit``: bytes of a buffer, None for one buffer; they get about equally large, and one with a
    tensor of more bytes holds that alone.
    """
    total = sum(aligned(info.nbytes) for info in infos.values())
    limit = limit or max(total, 1)
    share = total / max(1, -(-total // limit))
    places: dict[str, Place] = {}
    buffer = begin = 0
    for name, info in sorted(infos.items(), key=lambda item: (item[1].file, item[1].begin)):
        if begin and (begin >= share or begin + info.nbytes > limit):
            buffer, begin = buffer + 1, 0
        places[name] = Place(info, buffer, begin)
        begin += aligned(info.nbytes)
    return places


def buffer_sizes(places: dict[str, Place]) -> list[int]:
    """Bytes of each buffer."""
    sizes: dict[int, int] = {}
    for place in places.values():
        sizes[place.buffer] = aligned(place.end)
    return list(sizes.values())
