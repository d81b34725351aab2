"""A checkpoint's tensors on a device: one copy, in few large buffers, with tensors as views.

Torch's Metal allocator rounds up: hundreds of buffers, or some of middling size, take up to a
gigabyte more than what lies in them. So all tensors together go into as few buffers as the device's
limit allows, about equally large ones.

Bytes of whole shards, or of a stage's parts of them, are read straight to where the GPU reads them,
through torch's view of these buffers for the host. Where there is none, they pass through a staging
buffer of at most 64 MB. Nothing is mapped, so no page of a file stays resident beside the copy.

safetensors too reads a whole shard to there, with ``device="mps"``, but makes a buffer for each
tensor, more than 700 for a model of 7B in 4 bits: 0.8.0 asks Metal for each of them, beside torch's
allocator (``get_tensors_mps`` of its Rust bindings); before, torch copied each from a mapped file.
It cannot put a file into one buffer, so what it does inside is done here for few.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import MemoryLimitError
from .host_view import host_view
from .mapped_file import read_bytes
from .safetensors_header import TensorInfo, printable
from .tensor_layout import Place, aligned, arrange, buffer_sizes

STAGING_BYTES = 64 << 20
BUFFER_BYTES = 2 << 30
"""The most in one buffer, unless a single tensor is larger. Some of torch's kernels count a view's
place in its buffer in 32 bits; and every Mac with Apple silicon allows as much."""
_ROUNDING = 2 << 20  # large buffers grow to a multiple of it in torch's allocator


class DeviceWeights:
    """The tensors ``names`` of a checkpoint, on ``device``.

    ``largest``  bytes that a buffer of the device may have; None asks torch
    ``staging``  bytes of the memory between file and device, where one is needed

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
        largest = largest_buffer() if largest is None else largest
        _refuse_larger(infos, largest)
        self._places = arrange(infos, min(BUFFER_BYTES, largest - min(_ROUNDING, largest // 2)))
        sizes = buffer_sizes(self._places)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        for number, buffer in enumerate(self.buffers):
            places = [place for place in self._places.values() if place.buffer == number]
            with host_view(buffer) as memory:
                if memory is not None:
                    _read(memory, places)
            if memory is None:
                _stage(buffer, places, staging)

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


def _refuse_larger(infos: dict[str, TensorInfo], largest: int) -> None:
    for name, info in infos.items():
        if aligned(info.nbytes) >= largest:
            raise MemoryLimitError(
                f"tensor {printable(name)} has {info.nbytes / 1e9:.2f} GB, but a buffer of this "
                f"GPU holds {largest / 1e9:.2f} GB at most; use device='cpu'."
            )


def _read(memory: memoryview, places: list[Place]) -> None:
    for place in places:
        read_bytes(place.info.file, place.info.begin, memory[place.begin : place.end])


def _stage(buffer: Tensor, places: list[Place], size: int) -> None:
    """Reads a window of the buffer after the other from the files, and copies each at once."""
    staged = torch.empty(min(size, len(buffer)), dtype=torch.uint8)
    memory: memoryview = staged.numpy().data
    for start in range(0, len(buffer), max(1, len(staged))):
        stop = min(len(buffer), start + len(staged))
        for place in places:
            low, high = max(start, place.begin), min(stop, place.end)
            if low < high:
                offset = place.info.begin + low - place.begin
                read_bytes(place.info.file, offset, memory[low - start : high - start])
        buffer[start:stop].copy_(staged[: stop - start])
