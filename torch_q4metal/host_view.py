"""The host's view of a buffer on MPS: on Apple silicon the CPU writes where the GPU reads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@contextmanager
def host_view(buffer: Tensor) -> Iterator[memoryview | None]:
    """The bytes of ``buffer``, uint8 [n] with a storage of its own on MPS, for the host to write.

    They are the host's inside the ``with``: the GPU has finished before, and sees what was written
    afterwards. None where torch has no such view: it is a function of torch's own for loaders,
    private so far, and for buffers that its allocator shares between CPU and GPU.
    """
    torch.mps.synchronize()
    alias = _alias(buffer)
    if alias is None:
        yield None
        return
    yield torch.empty(0, dtype=torch.uint8).set_(alias).numpy().data
    torch.mps.synchronize()


def _alias(buffer: Tensor) -> torch.UntypedStorage | None:
    try:
        alias = torch.mps._host_alias_storage(buffer.untyped_storage())
    except (AttributeError, RuntimeError, ValueError) as error:
        # Its text: a record that is kept would keep the error's frames, and so the buffer.
        logger.info("no view of GPU memory for the host: %s", str(error))
        return None
    return alias if alias.nbytes() >= len(buffer) else None
