"""A transport whose broken links are looked into before anybody hears of them.

A link breaks at both ends, and at the neighbours' of a rank that died; which rank it was is known
only after the ranks have told each other. So an error of a link waits for what the watch finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from ..errors import PipelineError
from .liveness import Member
from .transport import Transfer, Transport


class Watch(Protocol):
    """What ``launch`` needs of a watch over the other ranks: ``liveness.Liveness`` is one."""

    def member(self, rank: int, host: str) -> dict[str, Any]:
        """What the other ranks have to know of this one: the fields of ``Member``."""

    def start(self, rank: int, members: list[Member], secret: str, timeout: float) -> None:
        """Watches from here on. Rank 0 starts first, then 1, and so on."""

    def close(self, told: bool = False) -> None:
        """Says goodbye and stops watching."""

    def link_failed(self, rank: int, why: str) -> None:
        """Ends the process when it is known why, or returns."""

    def round_trip(self, rank: int) -> float:
        """Seconds that a line to a neighbour and its answer take. Raises PipelineError."""


class WatchedTransport:
    """``transport`` as it is, except that ``watch`` hears first that a link is gone."""

    def __init__(self, transport: Transport, watch: Watch) -> None:
        self._transport, self._watch = transport, watch
        self.rank, self.world_size = transport.rank, transport.world_size
        self._next = (self.rank + 1) % self.world_size
        self._before = (self.rank - 1) % self.world_size

    def send(self, message: Tensor) -> Transfer:
        return _WatchedTransfer(self, self._next, lambda: self._transport.send(message))

    def receive(self, buffer: Tensor) -> Transfer:
        return _WatchedTransfer(self, self._before, lambda: self._transport.receive(buffer))

    def close(self) -> None:
        self._transport.close()

    def link_failed(self, peer: int, error: PipelineError) -> None:
        self._watch.link_failed(peer, f"cannot be reached: {str(error).removesuffix('.')}")


class _WatchedTransfer:
    def __init__(
        self, transport: WatchedTransport, peer: int, begin: Callable[[], Transfer]
    ) -> None:
        self._transport, self._peer = transport, peer
        try:
            self._transfer = begin()
        except PipelineError as error:
            transport.link_failed(peer, error)
            raise

    def wait(self) -> None:
        try:
            self._transfer.wait()
        except PipelineError as error:
            self._transport.link_failed(self._peer, error)
            raise
