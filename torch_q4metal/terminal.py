"""What keeps a terminal whole while a model writes to it: harmless text, Ctrl-C in its place."""

import logging
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType, TracebackType
from typing import Any

from .cli import console

# Control codes become pictures that can be seen (ESC: U+241B); C1 codes such as the one-byte CSI
# have none. Carriage returns go: they would write over the line.
_HARMLESS = {code: chr(0x2400 + code) for code in range(0x20)}
_HARMLESS |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")
_HARMLESS |= {0x7F: "\u2421", ord("\r"): "", ord("\n"): "\n", ord("\t"): "\t"}


def printable(text: str) -> str:
    """``text`` without anything that a terminal would obey, newline and tab apart."""
    return text.translate(_HARMLESS)


class LogToStderr(logging.Handler):
    """Writes to what ``sys.stderr`` is at the moment: a status that is shown stays whole."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record in one line."""
        print(printable(self.format(record)), file=sys.stderr)


def show_log(quiet: bool = False, debug: bool = False) -> None:
    """The library's log goes to stderr from here on: what a download takes, warnings, errors."""
    handler = LogToStderr()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s" if debug else "%(message)s"))
    log = logging.getLogger(__package__)
    log.handlers = [handler]
    log.setLevel(logging.DEBUG if debug else logging.ERROR if quiet else logging.INFO)


def write_answer(text: str) -> None:
    """Write a piece of an answer to standard output at once; raw where that is no terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def status(text: str, quiet: bool = False) -> AbstractContextManager[object]:
    """Shows ``text`` while this is entered, if stderr is a terminal."""
    screen = console()
    return screen.status(text) if screen.is_terminal and not quiet else nullcontext()


class SharedKeys:
    """The terminal on standard input as the shell left it, while a program writes answers to it."""

    def __enter__(self) -> "SharedKeys":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing was changed."""

    @contextmanager
    def kept_back(self, reader: object = None) -> Iterator[None]:
        """What is typed while this is entered does not show, and waits for who reads next.

        Ctrl-C and Ctrl-Z work as ever. Does nothing where standard input is no terminal.
        """
        try:
            descriptor = sys.stdin.fileno()
            before = termios.tcgetattr(descriptor)
        except (termios.error, OSError, ValueError):
            yield
            return
        during = list(before)
        during[3] &= ~(termios.ECHO | termios.ICANON)
        try:
            termios.tcsetattr(descriptor, termios.TCSANOW, during)
            yield
        finally:
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


class Interrupts:
    """Ctrl-C while this is entered: KeyboardInterrupt between ``arm`` and ``disarm``, else nothing.

    It is raised once per ``arm``, so cleaning up is never interrupted in turn. An exception that
    strikes inside a finalizer is lost; ``requested`` stays true and can be looked at.
    """

    def __init__(self) -> None:
        self.requested = False
        self._armed = False
        self._previous: Any = None

    def arm(self) -> None:
        """From now on Ctrl-C raises KeyboardInterrupt."""
        self.requested, self._armed = False, True

    def disarm(self) -> None:
        """From now on Ctrl-C does nothing."""
        self._armed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
