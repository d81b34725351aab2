"""Whether the other ranks live: a thread of each rank, with connections of its own.

Every rank watches its neighbours and rank 0, and rank 0 watches all. Each says a line a second on
each connection, while it computes and while it is idle; a rank that says nothing for the timeout,
or whose connection ends without a goodbye, is lost. Rank 0 hears what all others have seen, decides
which rank it was, says so, and ends everybody.

The links that carry the model can't do this: a gloo receive that times out closes its pair for good
and blocks signals. The thread needs Python's lock for a moment each second, and gets it while a
chunk is computed: the operators release it (tests/pipeline/test_faults.py).

A rank listens on the one address by which the others reach it, and only until they have come; who
comes has to prove that it knows the run's secret, which travels with the other control messages.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NoReturn

from ..errors import PipelineError

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 30.0  # seconds
_LINE_BYTES = 4096  # a longer one is no line of ours
_CONNECT_SECONDS = 10.0


class Evidence(IntEnum):
    """How much a sign says about which rank was lost; the least is believed first."""

    SEEN = 0  # its connection to this rank ended, or fell silent
    REPORTED = 1  # another rank has seen that
    LINK = 2  # a link of the model's broke: either end may be to blame


@dataclass(frozen=True)
class Sign:
    """That ``rank`` is lost; ``why`` is what it did, as in "has ended"."""

    evidence: Evidence
    rank: int
    why: str


@dataclass(frozen=True)
class Member:
    """Where a rank's thread is reached. ``port`` 0: it listens for nobody."""

    rank: int
    host: str
    address: str
    port: int


def watched_by(rank: int, world_size: int) -> list[int]:
    """The ranks that ``rank`` watches: all for rank 0, else rank 0 and the neighbours."""
    return [
        other
        for other in range(world_size)
        if other != rank and (0 in (rank, other) or abs(rank - other) == 1)
    ]


def end_process(sentence: str | None) -> NoReturn:
    """Ends this process at once with 1, whatever its threads do, after ``sentence`` on stderr."""
    if sentence is not None:
        # Past sys.stderr, whose lock another thread may hold. A terminal may have a hidden cursor.
        begin = "\x1b[?25h\x1b[?2004l\r\n" if os.isatty(2) else ""
        text = f"{begin}error: {sentence}\n"
        os.write(2, text.encode(errors="replace"))
    time.sleep(0.1)  # the end of a process may overtake what it has sent
    os._exit(1)


@dataclass(eq=False)
class _Peer:
    """One connection. ``rank`` is -1 until the other side has proved who it is."""

    link: socket.socket
    rank: int
    heard: float
    nonce: str = ""
    unread: bytes = b""
    sending: threading.Lock = field(default_factory=threading.Lock)

    def say(self, **words: Any) -> None:
        """Sends a line. One that does not fit into an empty buffer finds nobody who listens."""
        with self.sending, contextlib.suppress(OSError):  # the receiving side tells
            self.link.send(json.dumps(words).encode() + b"\n")


class Liveness:
    """This rank's watch over the others.

    ``address``  of this machine, by which the other ranks reach it
    ``on_end``   called in the thread, with a sentence or None, when a rank was lost; it ends the
                 process, and another thread's work with it
    ``agent``    pid of the process that started this one and has to live on, or None
    """

    def __init__(
        self,
        address: str,
        on_end: Callable[[str | None], object] = end_process,
        agent: int | None = None,
    ) -> None:
        self._on_end, self._agent = on_end, agent
        self._listener = socket.create_server((address, 0), family=_family(address))
        self._listener.setblocking(False)
        self._address = address
        self._members: list[Member] = []
        self._peers: dict[int, _Peer] = {}
        self._awaited: set[int] = set()  # ranks that have yet to come
        self._signs: list[tuple[float, Sign]] = []
        self._reported = False
        self._told = False  # the ranks have been told through the ring what went wrong
        self._pongs: dict[int, threading.Event] = {}
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._selector = selectors.DefaultSelector()

    def member(self, rank: int, host: str) -> dict[str, Any]:
        """What the other ranks have to know to reach this one, for a control message."""
        port = self._listener.getsockname()[1]
        return {"rank": rank, "host": host, "address": self._address, "port": port}

    def start(
        self, rank: int, members: list[Member], secret: str, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Connects to the ranks below, which have started, and watches from here on.

        ``secret`` is the same on all ranks; ``timeout`` in seconds. Raises PipelineError if one of
        them cannot be reached.
        """
        self.rank, self._members = rank, members
        self._secret, self._timeout = bytes.fromhex(secret), timeout
        self._beat_every = min(1.0, timeout / 8)
        watched = watched_by(rank, len(members))
        for other in watched:
            if other < rank:
                self._add(_Peer(self._dial(members[other]), other, time.monotonic()))
        self._awaited = {other for other in watched if other > rank}
        if self._awaited:
            self._selector.register(self._listener, selectors.EVENT_READ)
        else:
            self._listener.close()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)
        self._thread.start()

    def close(self, told: bool = False) -> None:
        """Says goodbye and stops watching. Call it once the other ranks may leave as well.

        ``told``: not a good end, but rank 0 has heard the reason through the ring.
        """
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        for peer in list(self._peers.values()):
            peer.say(**({"told": True} if told else {"bye": True}))
            peer.link.close()
        self._listener.close()

    def link_failed(self, rank: int, why: str) -> None:
        """A link to ``rank`` broke: waits for what is found out about it, which ends the process.

        Returns where nobody watches, or nothing is found out in time.
        """
        if self._thread is None or self._over.is_set():
            return
        self._signs.append((time.monotonic(), Sign(Evidence.LINK, rank, why)))
        self._over.wait(self._timeout + 10)

    def round_trip(self, rank: int, timeout: float = 5.0) -> float:
        """Seconds that a line to a watched rank and its answer take. Raises PipelineError."""
        number = secrets.randbits(60)
        self._pongs[number] = event = threading.Event()
        begin = time.perf_counter()
        self._peers[rank].say(ping=number)
        if not event.wait(timeout):
            raise PipelineError(f"rank {rank} has not answered within {timeout:g} s.")
        return time.perf_counter() - begin

    # ---- connections

    def _dial(self, member: Member) -> socket.socket:
        place = f"rank {member.rank} on {member.host} at {member.address} port {member.port}"
        try:
            link = socket.create_connection((member.address, member.port), _CONNECT_SECONDS)
            nonce = _read_line(link)["nonce"]
        except (OSError, ValueError, KeyError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "no answer"
            raise PipelineError(
                f"{place} cannot be reached from {socket.gethostname()} ({reason}); "
                "python -m torch_q4metal.doctor --cluster in place of the chat looks for the cause."
            ) from error
        link.sendall(json.dumps({"rank": self.rank, "proof": self._proof(nonce)}).encode() + b"\n")
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
        peer = _Peer(link, -1, time.monotonic(), nonce=secrets.token_hex(16))
        self._selector.register(link, selectors.EVENT_READ, peer)
        peer.say(nonce=peer.nonce)

    def _introduce(self, peer: _Peer, words: dict[str, Any]) -> None:
        """Takes up who has come, if it is one of the ranks that are awaited."""
        rank, proof = words.get("rank"), str(words.get("proof"))
        if rank not in self._awaited or not hmac.compare_digest(proof, self._proof(peer.nonce)):
            logger.warning("refused a connection to rank %d that knows no secret", self.rank)
            self._drop(peer)
            return
        peer.rank = rank
        self._add(peer)
        self._awaited.discard(rank)
        if not self._awaited:
            self._selector.unregister(self._listener)
            self._listener.close()

    def _add(self, peer: _Peer) -> None:
        peer.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers[peer.rank] = peer
        if peer.link not in self._selector.get_map():
            self._selector.register(peer.link, selectors.EVENT_READ, peer)

    def _drop(self, peer: _Peer) -> None:
        self._peers.pop(peer.rank, None)
        self._selector.unregister(peer.link)
        peer.link.close()

    # ---- the thread

    def _run(self) -> None:
        begin = previous = time.monotonic()
        next_beat = begin
        while not self._over.is_set():
            ready = self._selector.select(max(0.0, min(0.1, next_beat - time.monotonic())))
            for key, _ in ready:
                self._accept() if key.data is None else self._read(key.data)
            now = time.monotonic()
            if now - previous > self._timeout / 2:  # this process stood still, not the others
                for peer in self._peers.values():
                    peer.heard = now
            previous = now
            if now >= next_beat:
                next_beat = now + self._beat_every
                for peer in list(self._peers.values()):
                    peer.say(beat=True)
                self._look_for_silence(now, begin)
                self._look_for_agent()
            if self._signs:
                self._judge(now)

    def _look_for_silence(self, now: float, begin: float) -> None:
        for peer in list(self._peers.values()):
            if now - peer.heard > self._timeout:
                self._lose(peer, f"has not answered for {self._timeout:g} s")
        if now - begin > self._timeout:
            for rank in sorted(self._awaited):
                why = f"has not come within {self._timeout:g} s"
                self._signs.append((now, Sign(Evidence.SEEN, rank, why)))
            self._awaited.clear()

    def _look_for_agent(self) -> None:
        if self._agent is not None and os.getppid() != self._agent:
            self._end(f"what started rank {self.rank} on {socket.gethostname()} has ended.")

    def _lose(self, peer: _Peer, why: str) -> None:
        self._signs.append((time.monotonic(), Sign(Evidence.SEEN, peer.rank, why)))
        self._drop(peer)

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.link.recv(_LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data and peer.rank < 0:
            self._drop(peer)
        elif not data:
            self._lose(peer, "has ended, or its connection was cut")
        else:
            peer.heard = time.monotonic()
            *lines, peer.unread = (peer.unread + data).split(b"\n")
            for line in lines:
                self._hear(peer, _parse(line))
            if len(peer.unread) > _LINE_BYTES:
                self._drop(peer)

    def _hear(self, peer: _Peer, words: dict[str, Any]) -> None:
        if peer.link.fileno() < 0:  # a line before has ended it
            return
        if peer.rank < 0:
            self._introduce(peer, words)
        elif "bye" in words:
            self._drop(peer)
        elif "ping" in words:
            peer.say(pong=words["ping"])
        elif "pong" in words:
            self._pongs.pop(words["pong"], threading.Event()).set()
        elif "told" in words:
            self._told = True
            self._lose(peer, "has failed")
        elif "lost" in words:
            evidence = Evidence(words["evidence"])
            sign = Sign(max(evidence, Evidence.REPORTED), words["lost"], words["why"])
            self._signs.append((time.monotonic(), sign))
        elif "end" in words:
            logger.debug("rank 0 says: %s", words["end"])
            self._end(None)

    def _judge(self, now: float) -> None:
        """Ends this rank, once others had the time to say what they have seen."""
        since = self._signs[0][0]
        sign = min((sign for _, sign in self._signs), key=lambda sign: sign.evidence)
        host = self._members[sign.rank].host
        sentence = f"rank {sign.rank} on {host} {sign.why}; all ranks end."
        if self.rank == 0:
            if now - since >= self._patience(sign):
                for peer in list(self._peers.values()):
                    peer.say(end=sentence)
                self._end(None if self._told else sentence)
        elif 0 not in self._peers:
            self._end(None if self._told else sentence)
        elif not self._reported:
            self._reported = True
            self._peers[0].say(lost=sign.rank, why=sign.why, evidence=sign.evidence)
        elif now - since > 5:
            self._end(None)

    def _patience(self, sign: Sign) -> float:
        """Seconds that rank 0 waits for other signs."""
        if self._told:  # its own thread is about to say it
            return 2.0
        # What this rank has seen is certain, and torchrun, which looks for dead workers ten times
        # a second, ends rank 0 without a word.
        return 0.0 if sign.evidence is Evidence.SEEN else 0.5

    def _end(self, sentence: str | None) -> None:
        self._on_end(sentence)  # before ``link_failed`` returns, whose caller would say less
        self._over.set()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _parse(line: bytes) -> dict[str, Any]:
    """What a line says; nothing if it is none of ours."""
    try:
        words = json.loads(line)
    except ValueError:
        return {}
    return words if isinstance(words, dict) else {}


def _read_line(link: socket.socket) -> dict[str, Any]:
    """The first line from a connection. Raises OSError or ValueError."""
    data = b""
    while not data.endswith(b"\n"):
        piece = link.recv(_LINE_BYTES - len(data))
        if not piece:
            raise ValueError("it hung up")
        data += piece
    return _parse(data)
