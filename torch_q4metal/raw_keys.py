"""The terminal of a chat whose processes torchrun started.

Torchrun gives each worker a session of its own, so the terminal sends Ctrl-C to torchrun alone,
which then ends everything. The chat therefore switches the terminal's signals off from its first
prompt to its end, and reads Ctrl-C as the byte that it is.
"""

from __future__ import annotations

import _thread
import codecs
import os
import select
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from prompt_toolkit.input import Input
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyPress

_CTRL_C = b"\x03"

# Waits for the chat to end and then undoes what it did to the terminal: the chat may be killed.
_GUARD = """
import sys, termios
before = eval(sys.argv[2])
sys.stdin.buffer.read()
try:
    termios.tcsetattr(int(sys.argv[1]), termios.TCSANOW, before)
except termios.error:
    pass
"""


class RawKeys:
    """The terminal on standard input without signals, while this is entered.

    ``Repl`` uses it in place of ``terminal.SharedKeys``. ``interrupt`` is called, in another
    thread, for a Ctrl-C that is typed into an answer; the default is what SIGINT would do. The
    terminal is restored however the process ends, SIGKILL included.
    """

    def __init__(self, interrupt: Callable[[], None] = _thread.interrupt_main) -> None:
        self._interrupt = interrupt
        self._descriptor = sys.stdin.fileno()
        self._before: list[Any] = []
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RawKeys:
        self._before = termios.tcgetattr(self._descriptor)
        terminal = os.dup(self._descriptor)  # 0 itself is the guard's pipe
        self._guard = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _GUARD, str(terminal), repr(self._before)],
            stdin=subprocess.PIPE,
            pass_fds=[terminal],
            start_new_session=True,  # what ends the chat must not end its guard
        )
        os.close(terminal)
        during = list(self._before)
        during[3] &= ~(termios.ISIG | termios.ECHO | termios.ICANON)
        termios.tcsetattr(self._descriptor, termios.TCSANOW, during)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        termios.tcsetattr(self._descriptor, termios.TCSANOW, self._before)
        if self._guard is not None:
            self._guard.communicate()

    @contextmanager
    def kept_back(self, reader: Input) -> Iterator[None]:
        """While an answer is written: Ctrl-C interrupts, other keys wait for ``reader``."""
        typed: list[bytes] = []
        stop, stopper = os.pipe()
        thread = threading.Thread(target=self._listen, args=(stop, typed), daemon=True)
        thread.start()
        try:
            yield
        finally:
            os.close(stopper)
            thread.join()
            os.close(stop)
            store_typeahead(reader, _key_presses(b"".join(typed)))

    def _listen(self, stop: int, typed: list[bytes]) -> None:
        while True:
            ready, _, _ = select.select([self._descriptor, stop], [], [])
            if stop in ready:
                return
            data = os.read(self._descriptor, 1024)
            if not data:  # the terminal is gone
                return
            if _CTRL_C in data:
                self._interrupt()
            typed.append(data.replace(_CTRL_C, b""))


def _key_presses(data: bytes) -> list[KeyPress]:
    presses: list[KeyPress] = []
    parser = Vt100Parser(presses.append)
    parser.feed_and_flush(codecs.decode(data, "utf-8", "surrogateescape"))
    return presses
