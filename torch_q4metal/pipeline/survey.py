"""What the ranks are and what the links between them do, measured: for ``doctor --cluster``.

Rank 0 calls ``survey``; the others answer from ``launch.serve``. Links are measured one after
another, around the ring: a rank times what the one before it sends.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .handshake import ask_round, describe, hear, pass_on
from .message import Kind, Message
from .transport import Transfer, Transport
from .watched import Watch
from .worker import Inbox

_PIECE_BYTES = 1 << 19
_AHEAD = 8  # pieces under way: 4 MiB, what 800 Mbit/s carry in a round trip of 40 ms
_FEWEST, _MOST = 16, 64  # pieces; 32 MiB take 0.3 s at 1 Gbit/s
_SECONDS = 0.5  # and no more pieces after that
_PINGS = 9


@dataclass(frozen=True)
class RankFacts:
    """One rank. ``memory``: free bytes, or None; ``speed``: bytes of weights read in a second.

    ``system`` as ``sys.platform``; ``device`` what its layers are computed on.
    """

    rank: int
    host: str
    version: str
    torch: str
    system: str
    device: str
    threads: int
    memory: int | None
    speed: float


@dataclass(frozen=True)
class LinkFacts:
    """The link from rank ``begin`` to rank ``end``.

    ``round_trip_s``  seconds that a line there and its answer take, a median
    ``bytes_s``       bytes a second that go from ``begin`` to ``end``
    """

    begin: int
    end: int
    round_trip_s: float
    bytes_s: float


def survey(
    transport: Transport, watch: Watch, roll: dict[str, Any]
) -> tuple[list[RankFacts], list[LinkFacts]]:
    """Rank 0: all ranks and links. ``roll``: what ``launch.call_roll`` gave.

    Raises PipelineError if a rank is lost, or runs something that gives no facts.
    """
    answer = ask_round(transport, roll | {"survey": [asdict(own_facts(transport.rank))]})
    ranks = [RankFacts(**each) for each in answer["survey"]]
    pass_on(transport, {"links": None})
    _send_pieces(transport, watch, [])
    hear(transport)
    return ranks, [LinkFacts(**each) for each in _time_pieces(transport)]


def own_facts(rank: int) -> RankFacts:
    """This rank, measured."""
    from .. import ops
    from ..device import resolve_device

    info = describe(rank, "auto", "auto")
    kind = resolve_device("auto").type
    device = f"cpu ({ops.cpu_kernels()})" if kind == "cpu" else kind
    return RankFacts(
        rank, info.host, info.version, torch.__version__, sys.platform, device,
        torch.get_num_threads(), info.memory, info.speed,
    )  # fmt: skip


def relay_links(transport: Transport, watch: Watch) -> None:
    """Other ranks, once they have heard of "links": times the link to here, then the next one's.

    Raises PipelineError if a rank is lost.
    """
    links = _time_pieces(transport)
    pass_on(transport, {"links": None})
    _send_pieces(transport, watch, links)


def _send_pieces(transport: Transport, watch: Watch, links: list[dict[str, Any]]) -> None:
    """Sends what the next rank times, then what was found out about the links before."""
    end = (transport.rank + 1) % transport.world_size
    round_trip = statistics.median(watch.round_trip(end) for _ in range(_PINGS))
    piece, last = Message(_PIECE_BYTES), Message(_PIECE_BYTES)
    piece.put_filler()
    last.put_control({"links": links, "round_trip_s": round_trip})
    begin = time.monotonic()
    sent: deque[Transfer] = deque()
    for count in range(_MOST):
        if count >= _FEWEST and time.monotonic() - begin > _SECONDS:
            break
        if len(sent) == _AHEAD:
            sent.popleft().wait()
        sent.append(transport.send(piece.tensor))
    for _ in range(_AHEAD):  # one for each receive that waits
        sent.append(transport.send(last.tensor))
    for transfer in sent:
        transfer.wait()


def _time_pieces(transport: Transport) -> list[dict[str, Any]]:
    """The links so far, with the one whose pieces arrive here."""
    inbox = Inbox(transport, _PIECE_BYTES, _AHEAD)
    arrived = []
    while (message := inbox.next()).kind == Kind.FILLER:
        arrived.append(time.perf_counter())
        inbox.give_back(message)
    content = message.control()
    inbox.drain()
    half = len(arrived) // 2  # TCP has found its speed by then
    size = _PIECE_BYTES * (len(arrived) - 1 - half)
    link = LinkFacts(
        (transport.rank - 1) % transport.world_size, transport.rank, content["round_trip_s"],
        size / max(arrived[-1] - arrived[half], 1e-9),
    )  # fmt: skip
    return [*content["links"], asdict(link)]
