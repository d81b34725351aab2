"""The ring over ZeroMQ with CURVE keys, for networks that nobody need trust; any mix of systems.

Every connection is encrypted, and refused unless its end has the cluster's key. No torchrun, no
torch store, and nothing that is received is unpickled.

Rank 0 listens on the one address that all others are given. Each rank connects to it, says who it
is and where it listens itself, and hears from it where the rank before it listens:

    every rank r > 0   -> rank 0      joining; afterwards its end says that a rank has gone
    every rank r > 0   -> rank r - 1  carries the messages from r - 1 to r
    the last rank      -> rank 0      carries the messages from the last rank to rank 0

So the last rank listens nowhere, and of two machines only rank 0's needs open ports: this one, and
the next one for liveness_zmq.py.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import threading
import time
from collections import deque
from typing import Any

import zmq
from torch import Tensor

from ..errors import PipelineError
from .addresses import why_unreachable
from .interrupts import Deferral
from .key_file import Key
from .zmq_address import Address, connect, listen_first, listen_later
from .zmq_watch import DOMAIN, Watch

logger = logging.getLogger(__name__)

_AHEAD = 4  # messages that may lie on each side of a link
_LARGEST = 1 << 31  # bytes of a message, as transport.py says
_CLOSING = 5.0  # seconds to deliver what was sent
_GRACE = 2.0  # seconds to let rank 0 be the first to go
_AWAKE = 0.02  # seconds to wait for a message without sleeping
_RETRY_MS = 1  # between attempts to send to a receiver that is behind
_JOIN_RETRY_MS = 10  # between looks at whether a connection stands
_LOOK_AFTER = 5.0  # seconds without a connection after which this rank looks why
_LOOK_SECONDS = 3.0  # for a look
_POLLIN = int(zmq.POLLIN)  # an enum's & takes longer than asking libzmq

Socket = zmq.Socket[bytes]


class ZmqTransport:
    """A ``Transport``. ``key``: the cluster's. ``address``: where this rank listens, or None."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        first: Address,
        key: Key,
        bind: str | None = None,
        *,
        join_timeout: float = 300.0,
    ) -> None:
        """Joins the ring, and returns when it is closed.

        first         where rank 0 listens
        bind          this machine's address or interface to listen on, where it must be named
        join_timeout  seconds to wait for the others

        Raises PipelineError if it cannot be.
        """
        self.rank, self.world_size = rank, world_size
        self._deadline = time.monotonic() + join_timeout
        self.key = key
        self.address: Address | None = None
        self._context = zmq.Context()
        self.watch = Watch(self._context, key.public)
        self._sockets: list[Socket] = []
        self._incoming: deque[_Incoming] = deque()
        self._outgoing: deque[_Outgoing] = deque()
        self._poller = zmq.Poller()
        self._is_closed = self._is_joined = False
        atexit.register(self.close)
        try:
            if rank == 0:
                self._gather(first, bind)
            else:
                self._join(first, bind)
        except BaseException:
            self.close()
            raise
        self._poller.register(self.watch.alarm, zmq.POLLIN)
        self._poller.register(self._in.socket, zmq.POLLIN)
        self._is_joined = True
        logger.info("rank %d: all %d ranks are there", rank, world_size)

    # ---- Transport

    def send(self, message: Tensor) -> _Outgoing:
        outgoing = _Outgoing(self, message)
        self._outgoing.append(outgoing)
        self.push()
        return outgoing

    def receive(self, buffer: Tensor) -> _Incoming:
        incoming = _Incoming(self, buffer)
        self._incoming.append(incoming)
        return incoming

    def close(self) -> None:
        """As ``Transport.close``. All let rank 0 go first, so that nobody seems to be lost."""
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        if self._is_joined and self.rank > 0:
            self.watch.rank_0_left.wait(_GRACE)
        self.watch.stop()
        for each in self._sockets:
            each.close(int(_CLOSING * 1000) if self._is_joined else 200)
        self._context.term()

    # ---- messages

    def push(self) -> None:
        """Hands over to libzmq, in their order, the messages that it takes now."""
        while self._outgoing and self._try_send(self._outgoing[0].message):
            self._outgoing.popleft().is_done = True

    def wait_for_room(self) -> None:
        """Returns soon. Raises PipelineError if a link is gone."""
        if self.watch.alarm.poll(_RETRY_MS):
            raise self._gone()

    def wait_for(self, incoming: _Incoming) -> None:
        """Fills buffers in their order, until this one's turn has come."""
        while not incoming.is_done:
            if self._outgoing:  # on a slow link libzmq had no room; the answer may depend on it
                with Deferral():
                    self.push()
                self._poller.poll(_RETRY_MS)
            elif not self._comes_soon():
                self._poller.poll()
            if self._has_come():  # also if a link is gone: what has come is taken first
                with Deferral():  # a message that was taken is accounted for
                    self._take()
            elif self.watch.loss is not None:
                raise self._gone()

    def _comes_soon(self) -> bool:
        """Looks for the next message without sleeping; False if none has come for a while.

        A processor that sleeps takes long to wake, which matters where a message comes every few
        milliseconds. (Gloo cannot be asked whether one has come.)
        """
        end = time.monotonic() + _AWAKE
        while not self._has_come():
            if self.watch.loss is not None or time.monotonic() > end:
                return False
            os.sched_yield()  # to libzmq's own thread, or to another stage
        return True

    def _has_come(self) -> int:
        events: int = self._in.socket.getsockopt(zmq.EVENTS)  # type: ignore[assignment]
        return events & _POLLIN

    def _try_send(self, message: Tensor) -> bool:
        link = self._out
        try:
            if link.peer is not None:
                link.socket.send(link.peer, zmq.SNDMORE | zmq.NOBLOCK)
            link.socket.send(message.numpy().data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            raise self._gone(f"the link to {link.name} is gone") from error
        return True

    def _take(self) -> None:
        link = self._in
        if link.peer is not None and link.socket.recv() != link.peer:
            while link.socket.getsockopt(zmq.RCVMORE):  # some other rank's: nothing is expected
                link.socket.recv()
            return
        incoming = self._incoming[0]
        size = link.socket.recv_into(incoming.memory)
        if size > len(incoming.memory):
            raise PipelineError(f"{link.name} sent {size} bytes, more than were expected.")
        incoming.is_done = True
        self._incoming.popleft()

    def _gone(self, otherwise: str = "a link is gone") -> PipelineError:
        return PipelineError(f"{self.watch.loss or otherwise}.")

    # ---- joining

    def _gather(self, first: Address, bind: str | None) -> None:
        """Rank 0: waits until all have said who they are, and tells each where to connect."""
        server, names = self._server()
        self.watch.start()
        self.address = listen_first(server, first, bind)
        absent = set(range(1, self.world_size))
        waiting: dict[int, tuple[bytes, str, str]] = {}
        while absent:
            ranks = ", ".join(map(str, sorted(absent)))
            logger.info("rank 0 listens on %s and waits for rank %s", self.address, ranks)
            peer, hello, descriptor = self._hear(server, f"rank {ranks}")
            problem = self._problem(hello, absent)
            if problem:
                logger.warning("refused a rank on %s: %s", hello.get("host"), problem)
                server.send_multipart([peer, _packed({"refused": problem})])
                continue
            rank = hello["join"]
            absent.discard(rank)
            names[descriptor] = f"rank {rank} on {hello['host']}"
            waiting[rank] = peer, hello["listens"], names[descriptor]
        for rank, (peer, _, _) in waiting.items():
            before = waiting[rank - 1][1] if rank > 1 else ""
            name = waiting[rank - 1][2] if rank > 1 else f"rank 0 on {socket.gethostname()}"
            after = waiting[rank + 1][2] if rank + 1 in waiting else ""
            told = {"before": before, "name": name, "after": after}
            server.send_multipart([peer, _packed(told)])
        ends: dict[int, bytes] = {}
        while len(ends) < 2:
            peer, hello, _ = self._hear(server, "the ring")
            ends[hello["link"]] = peer
        self._out = _Link(server, waiting[1][2], ends[0])
        self._in = _Link(server, waiting[self.world_size - 1][2], ends[self.world_size - 1])

    def _join(self, first: Address, bind: str | None) -> None:
        """Other ranks: says who this is, and connects to the rank before it."""
        rank_0 = f"rank 0 at {first}"
        is_last = self.rank == self.world_size - 1
        refusal = (
            f"{rank_0} does not take this rank's key; copy the key file of rank 0 to this machine"
        )
        star, star_is_up = self._client(rank_0, refusal, is_star=True)
        before, before_is_up = self._client(f"rank {self.rank - 1}", refusal)
        last = self._client(rank_0, refusal)[0] if is_last else None
        server, names = (None, {}) if is_last else self._server()
        self.watch.start()
        if server is not None:
            self.address = listen_later(server, self.rank, first, bind)
        logger.info("rank %d waits for rank 0 at %s", self.rank, first)
        connect(star, first)
        hello = {
            "join": self.rank, "world_size": self.world_size, "listens": str(self.address or "")
        }  # fmt: skip
        star.send(_packed(hello | {"host": socket.gethostname()}))
        self._wait_for_link(star_is_up, "rank 0", first)
        _, told, _ = self._hear(star, rank_0)
        if "refused" in told:
            raise PipelineError(told["refused"])
        where = Address.parse(told["before"]) if told["before"] else first
        connect(before, where)
        before.send(_packed({"link": self.rank - 1}))
        self._wait_for_link(before_is_up, told["name"], where)
        self._in = _Link(before, told["name"], None)
        if last is not None:
            connect(last, first)
            last.send(_packed({"link": self.rank}))
            self._out = _Link(last, rank_0, None)
        else:
            assert server is not None
            peer, _, descriptor = self._hear(server, told["after"])
            names[descriptor] = told["after"]
            self._out = _Link(server, told["after"], peer)

    def _problem(self, hello: dict[str, Any], absent: set[int]) -> str | None:
        """Why a rank cannot take part, if so."""
        rank, size = hello.get("join"), hello.get("world_size")
        if size != self.world_size:
            return f"--world-size is {self.world_size} on rank 0, but {size} on rank {rank}."
        if rank not in absent:
            return f"there is a rank {rank} already; give each process its own --rank."
        return None

    def _wait_for_link(self, is_up: threading.Event, name: str, where: Address) -> None:
        """Returns once a connection stands; says meanwhile what seems to be in the way.

        Raises PipelineError if it cannot be made, or not in time.
        """
        why, look = "", time.monotonic() + _LOOK_AFTER
        while not is_up.is_set():
            if self.watch.alarm.poll(_JOIN_RETRY_MS):
                raise self._gone()
            now = time.monotonic()
            if now < min(look, self._deadline):
                continue
            found = why_unreachable(where.host, where.port, _LOOK_SECONDS)
            if now >= self._deadline:
                found = found or f"{where} answers, but not as a rank of this cluster does."
                raise PipelineError(f"rank {self.rank} does not reach {name} in time: {found}")
            if found and found != why:
                logger.warning("rank %d still waits for %s: %s", self.rank, name, found)
            why, look = found or why, time.monotonic() + _LOOK_AFTER

    def _hear(self, source: Socket, whom: str) -> tuple[bytes, dict[str, Any], int]:
        """(identity, content, descriptor of the connection) of the next message of the joining."""
        poller = zmq.Poller()
        poller.register(source, zmq.POLLIN)
        poller.register(self.watch.alarm, zmq.POLLIN)
        left = self._deadline - time.monotonic()
        ready = dict(poller.poll(max(0, int(left * 1000))))
        if source in ready:
            *peer, frame = source.recv_multipart(copy=False)
            content = json.loads(frame.bytes)
            descriptor = int(frame.get(zmq.SRCFD))
            return (peer[0].bytes if peer else b""), content, descriptor
        if ready:
            raise self._gone()
        raise PipelineError(
            f"rank {self.rank} heard nothing from {whom} in time; is it started, and does a "
            "firewall let it through? On its machine, python -m torch_q4metal.doctor --cluster "
            "--connect HOST:PORT looks."
        )

    # ---- sockets

    def _socket(self, kind: int) -> Socket:
        made = self._context.socket(kind)
        made.curve_publickey, made.curve_secretkey = self.key.public, self.key.secret
        made.sndhwm = made.rcvhwm = _AHEAD
        made.maxmsgsize = _LARGEST
        self._sockets.append(made)
        return made

    def _server(self) -> tuple[Socket, dict[int, str]]:
        """A socket that others will connect to, and the names of those that matter."""
        made = self._socket(zmq.ROUTER)
        made.curve_server = True
        made.zap_domain = DOMAIN
        made.router_mandatory = True  # an error for a peer that is gone
        return made, self.watch.add_server(made)

    def _client(
        self, name: str, refusal: str, is_star: bool = False
    ) -> tuple[Socket, threading.Event]:
        """A socket that will connect to one other rank, and what is set once it has."""
        made = self._socket(zmq.DEALER)
        made.curve_serverkey = self.key.public
        return made, self.watch.add_client(made, name, refusal, is_star)


class _Link:
    """One neighbour: its name, and how it is reached. ``peer`` is its identity at a server."""

    def __init__(self, socket: Socket, name: str, peer: bytes | None) -> None:
        self.socket, self.name, self.peer = socket, name, peer


class _Outgoing:
    """A message that libzmq has, or will have when it is waited for."""

    def __init__(self, transport: ZmqTransport, message: Tensor) -> None:
        self._transport, self.message = transport, message
        self.is_done = False

    def wait(self) -> None:
        while not self.is_done:
            self._transport.wait_for_room()
            with Deferral():
                self._transport.push()


class _Incoming:
    """A buffer that waits for its message."""

    def __init__(self, transport: ZmqTransport, buffer: Tensor) -> None:
        self._transport, self.memory = transport, buffer.numpy().data
        self.is_done = False

    def wait(self) -> None:
        if not self.is_done:
            self._transport.wait_for(self)


def _packed(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()
