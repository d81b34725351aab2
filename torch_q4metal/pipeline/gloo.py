"""The ring over torch.distributed's gloo, for machines that trust their network.

``torchrun`` starts the processes and tells each its place. Its store listens on every interface and
unpickles what it is sent, and nothing is encrypted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..errors import PipelineError
from .diagnosis import explain
from .gloo_lengths import Inbox, Sent
from .rendezvous import meet
from .transport import Transfer

# For all of gloo's own connections; its accepting side waits five times as long.
_CONNECT = timedelta(seconds=120)
# A receive that times out closes its pair for good, and an idle chat may wait for days: liveness is
# watched elsewhere.
_NEVER = timedelta(days=3650)
LENGTHS_AHEAD = sys.platform == "darwin"
"""Whether this system's gloo needs them: see gloo_lengths.py."""


class GlooTransport:
    """A ``Transport``. Needs the environment that torchrun sets; there can be one a process.

    ``lengths_ahead``: each message is announced by its length (gloo_lengths.py).
    """

    def __init__(self, lengths_ahead: bool = LENGTHS_AHEAD) -> None:
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
        self._take_place(world(), dist.get_rank(), dist.get_world_size(), lengths_ahead)

    def _take_place(
        self, group: dist.ProcessGroup, rank: int, world_size: int, lengths_ahead: bool
    ) -> None:
        self._group, self.rank, self.world_size = group, rank, world_size
        self._next, self._before = (rank + 1) % world_size, (rank - 1) % world_size
        self._inbox = Inbox(self._begin_receive) if lengths_ahead else None

    def send(self, message: Tensor) -> Transfer:
        if self._inbox is not None:
            return Sent(self._begin_send, message)
        return self._begin_send(message)

    def receive(self, buffer: Tensor) -> Transfer:
        if self._inbox is not None:
            return self._inbox.receive(buffer)
        # On Linux gloo takes a message that is shorter than the buffer as it is (tested).
        return self._begin_receive(buffer)

    def _begin_send(self, message: Tensor, tag: int = 0) -> _GlooTransfer:
        return _GlooTransfer(self._group.send, message, self._next, tag)

    def _begin_receive(self, buffer: Tensor, tag: int = 0) -> _GlooTransfer:
        return _GlooTransfer(self._group.recv, buffer, self._before, tag)

    def close(self) -> None:
        if self._inbox is not None:
            self._inbox.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def world() -> dist.ProcessGroup:
    """The group of all ranks. Its methods skip checks of ``dist.isend`` that take 50 us a hop."""
    group = dist.group.WORLD
    assert group is not None, "init_process_group has been called"
    return group


class _GlooTransfer:
    def __init__(
        self,
        begin: Callable[[list[Tensor], int, int], Any],
        tensor: Tensor,
        peer: int,
        tag: int,
    ) -> None:
        self._tensor = tensor  # gloo reads or writes it until it is done
        self._peer = peer
        try:
            self._work = begin([tensor], peer, tag)
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
