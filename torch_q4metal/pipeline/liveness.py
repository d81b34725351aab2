"""Whether the other ranks live: a thread of each rank, with connections of its own.

Every rank watches its neighbours and rank 0, and rank 0 watches all. Each says a line a second on
each connection, while it computes and while it is idle; a rank that says nothing for nearly the
timeout, or whose connection ends without a goodbye, is lost. Rank 0 hears what all others have
seen, decides which rank it was, says so, and ends everybody.

The links that carry the model can't do this: a gloo receive that times out closes its pair for good
and blocks signals, and libzmq answers no heartbeat on a connection that it reads no further. The
thread needs Python's lock for a moment each second, and gets it while a chunk is computed: the
operators release it (tests/long/test_pipeline_faults.py).

What carries the lines is a ``Channel``: liveness_tcp.py under torchrun, liveness_zmq.py else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import termios
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NoReturn, Protocol

from ..errors import PipelineError

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 30.0  # seconds
LINE_BYTES = 4096  # a longer one is no line of ours
CONNECT_SECONDS = 10.0

Event = tuple[int, dict[str, Any] | None]
"""What a rank has said, {} when it has come, or None when its connection has ended."""


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

    def unreachable(self, why: str) -> str:
        """What to say if it is not reached; ``why`` is a sentence."""
        return (
            f"rank {self.rank} on {self.host} is not reached from {socket.gethostname()}, which "
            f"has to know whether it lives: {why}"
        )


class Channel(Protocol):
    """Carries lines between the threads. All but ``wake`` is the thread's, once it has started."""

    @property
    def address(self) -> str:
        """Of this machine, for the ranks above."""

    @property
    def port(self) -> int:
        """Where they connect; 0 if nobody does."""

    def connect(self, rank: int, below: list[Member], above: set[int], secret: str) -> None:
        """Connects to the watched ranks below, which wait for it, and takes up those above.

        ``secret`` is the same on all ranks. Raises PipelineError if one cannot be reached.
        """

    def say(self, rank: int, words: dict[str, Any]) -> None:
        """Sends a line, or nothing if the rank is gone or takes no more."""

    def hear(self, seconds: float) -> list[Event]:
        """What has come, in order; waits so long for something at most, or until ``wake``."""

    def wake(self) -> None:
        """For other threads: ``hear`` returns."""

    def drop(self, rank: int) -> None:
        """Closes the connection, of which nothing is heard any more."""

    def close(self) -> None:
        """Delivers what was said, and closes everything."""


def watched_by(rank: int, world_size: int) -> list[int]:
    """The ranks that ``rank`` watches: all for rank 0, else rank 0 and the neighbours."""
    return [
        other
        for other in range(world_size)
        if other != rank and (0 in (rank, other) or abs(rank - other) == 1)
    ]


def ending() -> Callable[[str | None], NoReturn]:
    """What ends this process at once with 1, whatever its threads do, after a sentence on stderr.

    The terminal gets back the modes that it has now.
    """
    modes = termios.tcgetattr(0) if os.isatty(0) else None

    def end(sentence: str | None) -> NoReturn:
        if modes is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(0, termios.TCSANOW, modes)
        if sentence is not None:
            # Past sys.stderr, whose lock another thread may hold. The cursor may be hidden.
            begin = "\x1b[?25h\x1b[?2004l\r\n" if os.isatty(2) else ""
            os.write(2, f"{begin}error: {sentence}\n".encode(errors="replace"))
        time.sleep(0.1)  # the end of a process may overtake what it has sent
        os._exit(1)

    return end


class Liveness:
    """This rank's watch over the others.

    ``channel``  between the ranks
    ``on_end``   called in the thread, with a sentence or None, when a rank was lost; it ends the
                 process, and another thread's work with it
    ``agent``    pid of the process that started this one and has to live on, or None
    """

    def __init__(
        self,
        channel: Channel,
        on_end: Callable[[str | None], object] | None = None,
        agent: int | None = None,
    ) -> None:
        self._channel, self._on_end, self._agent = channel, on_end or ending(), agent
        self._members: list[Member] = []
        self._heard: dict[int, float] = {}  # rank that is there -> when it last said something
        self._awaited: set[int] = set()  # ranks that have yet to come
        self._signs: list[tuple[float, Sign]] = []
        self._reported = False
        self._told = False  # the ranks have been told through the ring what went wrong
        self._pings: deque[tuple[int, int]] = deque()  # (rank, number) to be sent
        self._pongs: dict[int, threading.Event] = {}
        self._over = threading.Event()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def member(self, rank: int, host: str) -> dict[str, Any]:
        """What the other ranks have to know to reach this one, for a control message."""
        channel = self._channel
        return {"rank": rank, "host": host, "address": channel.address, "port": channel.port}

    def start(
        self, rank: int, members: list[Member], secret: str, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Connects to the ranks below, which have started, and watches from here on.

        ``secret`` is the same on all ranks; ``timeout`` in seconds. Raises PipelineError if one of
        them cannot be reached.
        """
        self.rank, self._members = rank, members
        self._beat_every = min(1.0, timeout / 8)
        # A beat may be on its way, and silence is looked for between beats: within the timeout.
        self._timeout, self._silence = timeout, timeout - 2 * self._beat_every
        watched = watched_by(rank, len(members))
        self._awaited = {other for other in watched if other > rank}
        below = [members[other] for other in watched if other < rank]
        self._channel.connect(rank, below, self._awaited, secret)
        self._heard = dict.fromkeys((member.rank for member in below), time.monotonic())
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)
        self._thread.start()

    def close(self, told: bool = False) -> None:
        """Says goodbye and stops watching. Call it once the other ranks may leave as well.

        ``told``: not a good end, but rank 0 has heard the reason through the ring.
        """
        self._over.set()
        if self._is_closed:
            return
        self._is_closed = True
        if self._thread is not None and self._thread is not threading.current_thread():
            self._channel.wake()
            self._thread.join()
        for rank in self._heard:
            self._channel.say(rank, {"told": True} if told else {"bye": True})
        self._channel.close()

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
        self._pings.append((rank, number))
        self._channel.wake()
        if not event.wait(timeout):
            raise PipelineError(f"rank {rank} has not answered within {timeout:g} s.")
        return time.perf_counter() - begin

    # ---- the thread

    def _run(self) -> None:
        begin = previous = time.monotonic()
        next_beat = begin
        while not self._over.is_set():
            for rank, words in self._channel.hear(max(0, min(0.1, next_beat - time.monotonic()))):
                self._hear(rank, words)
            while self._pings:
                rank, number = self._pings.popleft()
                self._channel.say(rank, {"ping": number})
            now = time.monotonic()
            if now - previous > self._silence / 2:  # this process stood still, not the others
                self._heard = dict.fromkeys(self._heard, now)
            previous = now
            if now >= next_beat:
                next_beat = now + self._beat_every
                for rank in self._heard:
                    self._channel.say(rank, {"beat": True})
                self._look_for_silence(now, begin)
                self._look_for_agent()
            if self._signs:
                self._judge(now)

    def _look_for_silence(self, now: float, begin: float) -> None:
        for rank, heard in list(self._heard.items()):
            if now - heard > self._silence:
                self._lose(rank, f"has not answered for {self._silence:g} s")
        if now - begin > self._silence:
            for rank in sorted(self._awaited):
                why = f"has not come within {self._silence:g} s"
                self._signs.append((now, Sign(Evidence.SEEN, rank, why)))
            self._awaited.clear()

    def _look_for_agent(self) -> None:
        if self._agent is not None and os.getppid() != self._agent:
            self._end(f"what started rank {self.rank} on {socket.gethostname()} has ended.")

    def _lose(self, rank: int, why: str) -> None:
        self._signs.append((time.monotonic(), Sign(Evidence.SEEN, rank, why)))
        self._leave(rank)

    def _leave(self, rank: int) -> None:
        self._heard.pop(rank, None)
        self._channel.drop(rank)

    def _hear(self, rank: int, words: dict[str, Any] | None) -> None:
        if rank in self._awaited:
            self._awaited.discard(rank)
            self._heard[rank] = time.monotonic()
        if rank not in self._heard:  # something before has ended it
            return
        self._heard[rank] = time.monotonic()
        if words is None:
            self._lose(rank, "has ended, or its connection was cut")
        elif "bye" in words:
            self._leave(rank)
        elif "ping" in words:
            self._channel.say(rank, {"pong": words["ping"]})
        elif "pong" in words:
            self._pongs.pop(words["pong"], threading.Event()).set()
        elif "told" in words:
            self._told = True
            self._lose(rank, "has failed")
        elif "lost" in words:
            evidence = max(Evidence(words["evidence"]), Evidence.REPORTED)
            self._signs.append((time.monotonic(), Sign(evidence, words["lost"], words["why"])))
        elif "end" in words:
            logger.debug("rank 0 says: %s", words["end"])
            self._end(None)

    def _judge(self, now: float) -> None:
        """Ends this rank, once others had the time to say what they have seen."""
        since = self._signs[0][0]
        sign = min((sign for _, sign in self._signs), key=lambda sign: sign.evidence)
        sentence = f"rank {sign.rank} on {self._members[sign.rank].host} {sign.why}; all ranks end."
        if self.rank == 0:
            if now - since >= self._patience(sign):
                for rank in self._heard:
                    self._channel.say(rank, {"end": sentence})
                self._end(None if self._told else sentence)
        elif 0 not in self._heard:
            self._end(None if self._told else sentence)
        elif not self._reported:
            self._reported = True
            why = sign.why
            if sign.evidence is Evidence.SEEN:
                why += f", as seen from rank {self.rank} on {self._members[self.rank].host}"
            report = {"lost": sign.rank, "why": why, "evidence": sign.evidence}
            self._channel.say(0, report)
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


class Waker:
    """A file descriptor that is readable between ``wake`` and ``clear``."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        return self._read

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is readable already
            os.write(self._write, b"!")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, LINE_BYTES)

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


def line_of(words: dict[str, Any]) -> bytes:
    return json.dumps(words).encode() + b"\n"


def words_of(line: bytes) -> dict[str, Any]:
    """What a line says; nothing if it is none of ours."""
    try:
        words = json.loads(line)
    except ValueError:
        return {}
    return words if isinstance(words, dict) else {}
