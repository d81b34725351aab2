"""A checkpoint's tensors on a device: one copy, in few large buffers, with tensors as views.

Torch's Metal allocator rounds up: hundreds of buffers, or some of middling size, take up to a
gigabyte more than what lies in them. So all tensors together go into as few buffers as the device's
limit allows, about equally large ones.

Files are read into a staging buffer of at most 64 MB and copied from there. They are never mapped,
so no page of theirs stays resident beside the copy, and a stage of a pipeline reads its own bytes
only. safetensors can read a whole shard into Metal buffers that it makes itself, beside torch's
allocator; it cannot do so for a part of a shard, nor on any machine but a Mac. One way that is
right for all is worth more than the copy that it would save.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import MemoryLimitError
from .mapped_file import read_bytes
from .safetensors_header import TensorInfo, printable

STAGING_BYTES = 64 << 20
BUFFER_BYTES = 2 << 30
"""The most in one buffer, unless a single tensor is larger. Some of torch's kernels count a view's
place in its buffer in 32 bits; and every Mac with Apple silicon allows as much."""
_ALIGNMENT = 256  # of tensors; kernels load 16 bytes at a time
_ROUNDING = 2 << 20  # large buffers grow to a multiple of it in torch's allocator


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: at byte ``begin`` of buffer number ``buffer``."""

    info: TensorInfo
    buffer: int
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.info.nbytes


class DeviceWeights:
    """The tensors ``names`` of a checkpoint, on ``device``.

    ``largest``  bytes that a buffer of the device may have; None asks torch
    ``staging``  bytes of the memory between file and device

    Raises MemoryLimitError for a tensor that no buffer can hold, and CheckpointError for a file
    that cannot be read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Iterable[str],
        device: torch.device,
        *,
        largest: int | None = None,
        staging: int = STAGING_BYTES,
    ) -> None:
        infos = {name: checkpoint.info(name) for name in names}
        limit = largest_buffer() if largest is None else largest
        self._places = _arrange(infos, limit)
        by_buffer = itertools.groupby(self._places.values(), lambda place: place.buffer)
        contents = [list(places) for _, places in by_buffer]
        sizes = [_aligned(places[-1].end) for places in contents]
        staged = torch.empty(min(staging, max(sizes, default=0)), dtype=torch.uint8)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        for buffer, places in zip(self.buffers, contents, strict=True):
            _fill(buffer, places, staged)

    def tensor(self, name: str) -> Tensor:
        """The tensor with the file's dtype; uint32 comes as int32, as from a checkpoint."""
        place = self._places[name]
        info = place.info
        return (
            self.buffers[place.buffer][place.begin : place.end]
            .view(info.loaded_dtype)
            .view(info.shape)
        )


def largest_buffer() -> int:
    """Bytes that a Metal buffer may have on this machine."""
    ask = getattr(torch._C, "_mps_maxBufferLength", None)  # torch has it since 2.10
    return (ask and int(ask())) or BUFFER_BYTES


def _arrange(infos: dict[str, TensorInfo], largest: int) -> dict[str, _Place]:
    """Places in the order of the files, in buffers of about equal size."""
    limit = min(BUFFER_BYTES, largest - min(_ROUNDING, largest // 2))
    total = sum(_aligned(info.nbytes) for info in infos.values())
    share = total / max(1, -(-total // limit))
    places: dict[str, _Place] = {}
    buffer = begin = 0
    for name, info in sorted(infos.items(), key=lambda item: (item[1].file, item[1].begin)):
        if _aligned(info.nbytes) >= largest:
            raise MemoryLimitError(
                f"tensor {printable(name)} has {info.nbytes / 1e9:.2f} GB, but a buffer of this "
                f"GPU holds {largest / 1e9:.2f} GB at most; use device='cpu'."
            )
        if begin and (begin >= share or begin + info.nbytes > limit):
            buffer, begin = buffer + 1, 0
        places[name] = _Place(info, buffer, begin)
        begin += _aligned(info.nbytes)
    return places


def _fill(buffer: Tensor, places: list[_Place], staged: Tensor) -> None:
    """Reads a window of the buffer after the other from the files, and copies each at once."""
    memory: memoryview = staged.numpy().data
    for start in range(0, len(buffer), max(1, len(staged))):
        stop = min(len(buffer), start + len(staged))
        for place in places:
            low, high = max(start, place.begin), min(stop, place.end)
            if low < high:
                offset = place.info.begin + low - place.begin
                read_bytes(place.info.file, offset, memory[low - start : high - start])
        buffer[start:stop].copy_(staged[: stop - start])


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
