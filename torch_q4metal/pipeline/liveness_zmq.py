"""The watch's lines over ZeroMQ with CURVE keys, for ranks that ``torch_q4metal.cluster`` started.

Sockets of its own, and a port of its own: those of the model's messages belong to the thread that
computes. A rank listens where it listens for messages, one port further.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from ..errors import PipelineError
from .addresses import why_unreachable
from .key_file import Key
from .liveness import CONNECT_SECONDS, LINE_BYTES, Event, Member, Waker, line_of, words_of
from .zmq_address import Address, connect, listen_beside
from .zmq_watch import DOMAIN, KeyCheck

logger = logging.getLogger(__name__)

_AHEAD = 8  # lines that wait for a rank that reads none
_LOOK_SECONDS = 3.0  # to find out why a rank does not answer
_LINGER = 200  # milliseconds to deliver a goodbye

Socket = zmq.Socket[bytes]


class ZmqChannel:
    """A ``liveness.Channel``. ``beside``: where this rank listens for messages, None if nowhere.

    Raises PipelineError if it cannot listen.
    """

    def __init__(self, key: Key, beside: Address | None) -> None:
        self._key = key
        self._context = zmq.Context()
        self._keys = KeyCheck(self._context, key.public)
        self._waker = Waker()
        self.wake = self._waker.wake
        self._clients: dict[int, Socket] = {}  # rank below -> the connection to it
        self._servants: dict[bytes, int] = {}  # identity -> rank above that has come
        self._descriptors: dict[int, int] = {}  # descriptor -> that rank
        self._monitors: dict[Socket, int] = {}  # of each socket -> rank below, or -1
        self._awaited: set[int] = set()
        self._poller = zmq.Poller()
        self._poller.register(self._waker.fileno(), zmq.POLLIN)
        self._poller.register(self._keys.questions, zmq.POLLIN)
        self._server: Socket | None = None
        self.address, self.port = "", 0
        if beside is not None:
            self._server = self._socket(zmq.ROUTER, -1)
            self._server.curve_server = True
            self._server.zap_domain = DOMAIN
            where = listen_beside(self._server, beside)
            self.address, self.port = where.host, where.port

    def connect(self, rank: int, below: list[Member], above: set[int], secret: str) -> None:
        self._awaited = set(above)
        for member in below:
            self._dial(rank, member)

    def say(self, rank: int, words: dict[str, Any]) -> None:
        with contextlib.suppress(zmq.ZMQError):  # it reads no more; its silence tells
            if rank in self._clients:
                self._clients[rank].send(line_of(words), zmq.NOBLOCK)
            for identity, other in self._servants.items():
                if other == rank and self._server is not None:
                    self._server.send_multipart([identity, line_of(words)], zmq.NOBLOCK)

    def hear(self, seconds: float) -> list[Event]:
        events: list[Event] = []
        ready = dict(self._poller.poll(int(seconds * 1000)))
        if self._waker.fileno() in ready:
            self._waker.clear()
        if self._keys.questions in ready:
            self._keys.answer()
        # What a rank said before its connection ended is heard before that.
        for rank, client in list(self._clients.items()):
            while (frames := _receive(client)) is not None:
                events.append((rank, words_of(frames[-1].bytes)))
        while self._server is not None and (frames := _receive(self._server)) is not None:
            events += self._sort(*frames)
        for monitor in self._monitors:
            if monitor in ready:
                events += self._hear_monitor(monitor)
        return events

    def drop(self, rank: int) -> None:
        if rank in self._clients:
            self._forget(self._clients.pop(rank), rank)
        for identity in [one for one, other in self._servants.items() if other == rank]:
            del self._servants[identity]

    def close(self) -> None:
        for rank in list(self._clients):
            self.drop(rank)
        if self._server is not None:
            self._forget(self._server, -1)
        self._keys.close()
        self._waker.close()
        self._context.term()

    def _dial(self, rank: int, member: Member) -> None:
        client = self._socket(zmq.DEALER, member.rank)
        client.curve_serverkey = self._key.public
        client.reconnect_ivl = -1
        self._clients[member.rank] = client
        connect(client, Address(member.address, member.port))
        monitor = next(one for one, below in self._monitors.items() if below == member.rank)
        deadline = time.monotonic() + CONNECT_SECONDS
        while monitor.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            if recv_monitor_message(monitor)["event"] != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                break
            client.send(line_of({"rank": rank}), zmq.NOBLOCK)
            return
        why = why_unreachable(member.address, member.port, _LOOK_SECONDS)
        why = why or f"{member.address}:{member.port} does not take this rank's key."
        raise PipelineError(member.unreachable(why))

    def _sort(self, identity: zmq.Frame, line: zmq.Frame) -> list[Event]:
        """Whose line it is; the first one of a connection says."""
        words = words_of(line.bytes)
        rank = self._servants.get(identity.bytes)
        if rank is not None:
            return [(rank, words)]
        rank = words.get("rank")
        if rank not in self._awaited:
            return []
        self._awaited.discard(rank)
        self._servants[identity.bytes] = rank
        self._descriptors[int(line.get(zmq.SRCFD))] = rank
        return [(rank, {})]

    def _hear_monitor(self, monitor: Socket) -> list[Event]:
        message = recv_monitor_message(monitor)
        rank = self._monitors[monitor]
        if rank < 0:
            rank = self._descriptors.pop(int(message["value"]), -1)
        return [] if rank < 0 else [(rank, None)]

    def _socket(self, kind: int, rank: int) -> Socket:
        made = self._context.socket(kind)
        made.curve_publickey, made.curve_secretkey = self._key.public, self._key.secret
        made.sndhwm = made.rcvhwm = _AHEAD
        made.maxmsgsize = LINE_BYTES
        events = zmq.EVENT_DISCONNECTED
        if rank >= 0:
            events |= zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            events |= zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            events |= zmq.EVENT_CLOSED  # nobody listens there
        monitor = made.get_monitor_socket(events)
        self._monitors[monitor] = rank
        for polled in (made, monitor):
            self._poller.register(polled, zmq.POLLIN)
        return made

    def _forget(self, used: Socket, rank: int) -> None:
        self._poller.unregister(used)
        for monitor in [one for one, other in self._monitors.items() if other == rank]:
            del self._monitors[monitor]
            self._poller.unregister(monitor)
            used.disable_monitor()
            monitor.close(0)
        used.close(_LINGER)


def _receive(source: Socket) -> list[zmq.Frame] | None:
    """A message that has come, if one has."""
    try:
        return source.recv_multipart(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
