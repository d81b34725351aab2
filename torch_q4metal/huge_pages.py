"""A checkpoint's tensors on the CPU, read into memory that Linux backs with huge pages.

Decoding reads every weight once a token. In pages of 4 KB, as a mapped file's are, the walk through
page tables limits that, most of all in virtual machines: on a 2-core virtual machine of AMD Zen 4 a
plain read of a mapped file does 15 GB/s with one thread and 24 with two, of huge pages 29 and 33,
and Qwen2.5-0.5B decodes 1.2 times as fast (benchmarks/LOG.md).

The bytes are the same and as many, once, at addresses that are multiples of a cache line. But they
belong to the process: the system cannot drop them and read them again, and two processes do not
share them. So where memory is short the file stays mapped.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .environment import HUGE_PAGES
from .mapped_file import read_bytes
from .memory import available_memory
from .tensor_layout import arrange, buffer_sizes

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LEAST_BYTES = 32 << 20  # less stays in caches, or is soon read
_SPARE = 1.25  # of the weights' size has to be free


class HugePageWeights:
    """The tensors ``names`` of a checkpoint. Raises CheckpointError if a file cannot be read."""

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str]) -> None:
        self._places = arrange({name: checkpoint.info(name) for name in names})
        size = max([1, *buffer_sizes(self._places)])
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if sys.platform == "linux":
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        with memoryview(self._memory) as memory:
            for place in self._places.values():
                info = place.info
                read_bytes(info.file, info.begin, memory[place.begin : place.end])

    def tensor(self, name: str) -> Tensor:
        """The tensor with the file's dtype; uint32 comes as int32, as from a checkpoint."""
        info = self._places[name].info
        dtype = info.loaded_dtype
        if info.numel == 0:
            return torch.empty(info.shape, dtype=dtype)
        begin = self._places[name].begin
        flat = torch.frombuffer(self._memory, dtype=dtype, count=info.numel, offset=begin)
        return flat.view(info.shape)


def are_worthwhile(size: int, setting: Path = _SETTING, available: int | None = None) -> bool:
    """Whether weights of ``size`` bytes should be read into huge pages rather than be mapped.

    ``available``: bytes of memory that are free, None for ``available_memory()``.
    """
    if sys.platform != "linux" or HUGE_PAGES.get() == "0" or size < _LEAST_BYTES:
        return False
    try:
        if "[never]" in setting.read_text():
            return False
    except OSError:  # a kernel without them
        return False
    free = available_memory() if available is None else available
    return free is not None and free >= _SPARE * size
