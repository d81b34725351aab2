"""A checkpoint's tensors on a device: one copy, in few large buffers, with tensors as views.

Torch's Metal allocator rounds up: hundreds of buffers, or some of middling size, take up to a
gigabyte more than what lies in them. So all tensors together go into as few buffers as the device's
limit allows, about equally large ones.

A shard of which all tensors are wanted is read by safetensors with ``device="mps"``: since its 0.8
it reads to where the GPU does (``get_tensor_mps`` and ``slice_mps`` of its Rust bindings). But each
tensor or slice comes in a buffer of its own, so at most 64 MB are asked for, and the GPU moves them
to their places. Parts of a shard pass through a staging buffer of at most 64 MB. Nothing is mapped,
so no page of a file stays resident beside the copy.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError, MemoryLimitError
from .mapped_file import read_bytes
from .safetensors_header import TensorInfo, printable
from .tensor_layout import Place, aligned, arrange, buffer_sizes

logger = logging.getLogger(__name__)

STAGING_BYTES = 64 << 20
BUFFER_BYTES = 2 << 30
"""The most in one buffer, unless a single tensor is larger. Some of torch's kernels count a view's
place in its buffer in 32 bits; and every Mac with Apple silicon allows as much."""
_ROUNDING = 2 << 20  # large buffers grow to a multiple of it in torch's allocator


class DeviceWeights:
    """Tensors of weight files on ``device``.

    ``infos``    by name: where they lie in the files
    ``largest``  bytes that a buffer of the device may have; None asks torch
    ``staging``  bytes of the memory between file and buffers, at most

    Raises MemoryLimitError for a tensor that no buffer can hold, and CheckpointError for a file
    that cannot be read.
    """

    def __init__(
        self,
        infos: Mapping[str, TensorInfo],
        device: torch.device,
        *,
        largest: int | None = None,
        staging: int = STAGING_BYTES,
    ) -> None:
        largest = largest_buffer() if largest is None else largest
        _refuse_larger(infos, largest)
        self._places = arrange(infos, min(BUFFER_BYTES, largest - min(_ROUNDING, largest // 2)))
        sizes = buffer_sizes(self._places)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        for file, of_file in groupby(self._places.values(), lambda place: place.info.file):
            places = list(of_file)
            shard = _open_whole(file, [place.info for place in places], device, staging)
            for number, group in groupby(places, lambda place: place.buffer):
                if shard is None:
                    _stage(self.buffers[number], list(group), staging)
                else:
                    _move(shard, self.buffers[number], list(group), staging)

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


def _refuse_larger(infos: Mapping[str, TensorInfo], largest: int) -> None:
    for name, info in infos.items():
        if aligned(info.nbytes) >= largest:
            raise MemoryLimitError(
                f"tensor {printable(name)} has {info.nbytes / 1e9:.2f} GB, but a buffer of this "
                f"GPU holds {largest / 1e9:.2f} GB at most; use device='cpu'."
            )


def _open_whole(file: Path, infos: list[TensorInfo], device: torch.device, size: int) -> Any | None:
    """The file as safetensors gives its tensors on ``device``, if it can and all are wanted.

    It accepts no padding between tensors, and gives whole rows, which have to fit into ``size``.
    """
    if any(_row_bytes(info) > size for info in infos):
        return None
    try:
        shard: Any = safe_open(file, "pt", device=device.type, backend="pread")
    except (SafetensorError, OSError) as error:
        # Its text: a record that is kept would keep the error's frames, and so the buffers.
        logger.info("%s is not read by safetensors: %s", file, str(error))
        return None
    return shard if len(shard.keys()) == len(infos) else None


def _move(shard: Any, buffer: Tensor, places: list[Place], size: int) -> None:
    """Has safetensors read tensors into GPU memory, and the GPU move them to their places.

    At most ``size`` bytes are on their way: what the GPU has not moved yet is kept and counted.
    """
    waiting: list[Tensor] = []
    on_the_way = 0
    for place in places:
        for begin, end in _row_ranges(place.info, size):
            start, stop = (place.begin + row * _row_bytes(place.info) for row in (begin, end))
            if on_the_way + stop - start > size:
                torch.mps.synchronize()
                waiting.clear()
                on_the_way = 0
            waiting.append(_rows(shard, place.info, begin, end))
            buffer[start:stop].copy_(waiting[-1].reshape(-1).view(torch.uint8))
            on_the_way += stop - start
    torch.mps.synchronize()


def _rows(shard: Any, info: TensorInfo, begin: int, end: int) -> Tensor:
    """Rows of a tensor in memory of their own on the device."""
    try:
        if end - begin < _row_count(info):
            return shard.get_slice(info.name)[begin:end]
        return shard.get_tensor(info.name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"tensor {printable(info.name)} of {info.file} cannot be read: {error}."
        ) from None


def _row_count(info: TensorInfo) -> int:
    return info.shape[0] if info.shape else 1


def _row_bytes(info: TensorInfo) -> int:
    return info.nbytes // max(1, _row_count(info))


def _row_ranges(info: TensorInfo, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of as many rows at a time as ``size`` bytes hold; none for an empty tensor."""
    count = _row_count(info) if info.nbytes else 0
    step = size // max(1, _row_bytes(info))
    return ((row, min(row + step, count)) for row in range(0, count, max(1, step)))


def _stage(buffer: Tensor, places: list[Place], size: int) -> None:
    """Reads a window after the other of these neighbours from their file, and copies each."""
    end = places[-1].end
    staged = torch.empty(min(size, end - places[0].begin), dtype=torch.uint8)
    memory: memoryview = staged.numpy().data
    for start in range(places[0].begin, end, max(1, len(staged))):
        stop = min(end, start + len(staged))
        for place in places:
            low, high = max(start, place.begin), min(stop, place.end)
            if low < high:
                offset = place.info.begin + low - place.begin
                read_bytes(place.info.file, offset, memory[low - start : high - start])
        buffer[start:stop].copy_(staged[: stop - start])
