"""The ring over torch.distributed's gloo, for machines that trust their network.

``torchrun`` starts the processes and tells each its place. Its store listens on every interface and
unpickles what it is sent, and nothing is encrypted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..errors import PipelineError
from .diagnosis import explain
from .rendezvous import meet

# For all of gloo's own connections; its accepting side waits five times as long.
_CONNECT = timedelta(seconds=120)
# A receive that times out closes its pair for good, and an idle chat may wait for days: liveness is
# watched elsewhere.
_NEVER = timedelta(days=3650)


class GlooTransport:
    """A ``Transport``. Needs the environment that torchrun sets; there can be one a process."""

    def __init__(self) -> None:
        """Joins the group. Raises PipelineError if that fails."""
        try:
            store, rank, size = meet()
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=size, timeout=_CONNECT
            )
        except PipelineError:
            raise
        except (RuntimeError, ValueError) as error:
            master = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            why = explain(error, master)
            raise PipelineError(f"this rank could not join the others: {why}") from error
        self._group = world()
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._next = (self.rank + 1) % self.world_size
        self._before = (self.rank - 1) % self.world_size

    def send(self, message: Tensor) -> _GlooTransfer:
        return _GlooTransfer(self._group.send, message, self._next)

    def receive(self, buffer: Tensor) -> _GlooTransfer:
        # Gloo takes a message that is shorter than the buffer as it is (tested).
        return _GlooTransfer(self._group.recv, buffer, self._before)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def world() -> dist.ProcessGroup:
    """The group of all ranks. Its methods skip checks of ``dist.isend`` that take 50 us a hop."""
    group = dist.group.WORLD
    assert group is not None, "init_process_group has been called"
    return group


class _GlooTransfer:
    def __init__(
        self, begin: Callable[[list[Tensor], int, int], Any], tensor: Tensor, peer: int
    ) -> None:
        self._tensor = tensor  # gloo reads or writes it until it is done
        self._peer = peer
        try:
            self._work = begin([tensor], peer, 0)
        except RuntimeError as error:
            raise _gone(peer, error) from error

    def wait(self) -> None:
        if self._work.is_completed():  # gloo would wait for another message
            return
        try:
            self._work.wait(_NEVER)
        except RuntimeError as error:
            raise _gone(self._peer, error) from error


def _gone(peer: int, error: RuntimeError) -> PipelineError:
    reason = str(error).splitlines()[0]
    return PipelineError(f"the link to rank {peer} is gone ({reason}).")
