"""The watch's lines over plain TCP, for ranks under torchrun: a network that is trusted.

A rank listens on the one address by which the others reach it, and only until they have come; who
comes has to prove that it knows the run's secret, which travels with the other control messages.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import selectors
import socket
from dataclasses import dataclass
from typing import Any

from ..errors import PipelineError
from .diagnosis import explain
from .liveness import CONNECT_SECONDS, LINE_BYTES, Event, Member, Waker, line_of, words_of

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Peer:
    """One connection. ``rank`` is -1 until the other side has proved who it is."""

    link: socket.socket
    rank: int
    nonce: str = ""
    unread: bytes = b""

    def say(self, words: dict[str, Any]) -> None:
        """Sends a line. One that does not fit into an empty buffer finds nobody who listens."""
        with contextlib.suppress(OSError):  # the receiving side tells
            self.link.send(line_of(words))


class TcpChannel:
    """A ``liveness.Channel``. ``address``: this machine's, by which the other ranks reach it."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family)
        self._listener.setblocking(False)
        self.address, self.port = address, int(self._listener.getsockname()[1])
        self._peers: dict[int, _Peer] = {}
        self._awaited: set[int] = set()
        self._waker = Waker()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._waker, selectors.EVENT_READ)
        self.wake = self._waker.wake

    def connect(self, rank: int, below: list[Member], above: set[int], secret: str) -> None:
        self._rank, self._secret = rank, bytes.fromhex(secret)
        for member in below:
            self._add(_Peer(self._dial(member), member.rank))
        self._awaited = set(above)
        if self._awaited:
            self._selector.register(self._listener, selectors.EVENT_READ)
        else:
            self._listener.close()

    def say(self, rank: int, words: dict[str, Any]) -> None:
        if rank in self._peers:
            self._peers[rank].say(words)

    def hear(self, seconds: float) -> list[Event]:
        events: list[Event] = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._waker:
                self._waker.clear()
            elif key.fileobj is self._listener:
                self._accept()
            else:
                events += self._read(key.data)
        return events

    def drop(self, rank: int) -> None:
        if rank in self._peers:
            self._close(self._peers[rank])

    def close(self) -> None:
        for peer in list(self._peers.values()):
            peer.link.close()
        self._listener.close()
        self._selector.close()
        self._waker.close()

    def _dial(self, member: Member) -> socket.socket:
        try:
            link = socket.create_connection((member.address, member.port), CONNECT_SECONDS)
            nonce = _read_line(link)["nonce"]
        except (OSError, ValueError, KeyError) as error:
            why = explain(error, f"{member.address}:{member.port}")
            raise PipelineError(member.unreachable(why)) from error
        link.sendall(line_of({"rank": self._rank, "proof": self._proof(nonce)}))
        link.setblocking(False)
        return link

    def _proof(self, nonce: str) -> str:
        return hmac.digest(self._secret, nonce.encode(), "sha256").hex()

    def _accept(self) -> None:
        try:
            link, _ = self._listener.accept()
        except OSError:
            return
        link.setblocking(False)
        peer = _Peer(link, -1, nonce=secrets.token_hex(16))
        self._selector.register(link, selectors.EVENT_READ, peer)
        peer.say({"nonce": peer.nonce})

    def _introduce(self, peer: _Peer, words: dict[str, Any]) -> list[Event]:
        """Takes up who has come, if it is one of the ranks that are awaited."""
        rank, proof = words.get("rank"), str(words.get("proof"))
        if rank not in self._awaited or not hmac.compare_digest(proof, self._proof(peer.nonce)):
            logger.warning("refused a connection to rank %d that knows no secret", self._rank)
            self._close(peer)
            return []
        peer.rank = rank
        self._add(peer)
        self._awaited.discard(rank)
        if not self._awaited:
            self._selector.unregister(self._listener)
            self._listener.close()
        return [(rank, {})]

    def _add(self, peer: _Peer) -> None:
        with contextlib.suppress(OSError):  # on macOS, where the other side has hung up already
            peer.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers[peer.rank] = peer
        if peer.link not in self._selector.get_map():
            self._selector.register(peer.link, selectors.EVENT_READ, peer)

    def _close(self, peer: _Peer) -> None:
        self._peers.pop(peer.rank, None)
        self._selector.unregister(peer.link)
        peer.link.close()

    def _read(self, peer: _Peer) -> list[Event]:
        try:
            data = peer.link.recv(LINE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self._close(peer)
            return [(peer.rank, None)] if peer.rank >= 0 else []
        *lines, peer.unread = (peer.unread + data).split(b"\n")
        events: list[Event] = []
        for line in lines:
            if peer.rank >= 0:
                events.append((peer.rank, words_of(line)))
            elif peer.link.fileno() >= 0:  # it was not refused by a line before
                events += self._introduce(peer, words_of(line))
        if len(peer.unread) > LINE_BYTES and peer.link.fileno() >= 0:
            self._close(peer)
        return events


def _read_line(link: socket.socket) -> dict[str, Any]:
    """The first line from a connection. Raises OSError or ValueError."""
    data = b""
    while not data.endswith(b"\n"):
        piece = link.recv(LINE_BYTES - len(data))
        if not piece:
            raise ValueError("it hung up")
        data += piece
    return words_of(data)
