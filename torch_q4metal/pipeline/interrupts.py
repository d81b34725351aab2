"""Ctrl-C that waits until something is done and accounted for."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import signal
import threading
from types import FrameType

# What signal.signal wraps: its look-ups in enums take 8 us a call, and every token makes several.
_set_handler = _signal.signal


class Deferral:
    """Ctrl-C while this is entered strikes when it is left."""

    def __enter__(self) -> None:
        self._struck: tuple[int, FrameType | None] | None = None
        self._is_main = threading.get_ident() == threading.main_thread().ident
        if self._is_main:
            self._previous = _set_handler(signal.SIGINT, self._strike)

    def __exit__(self, *error: object) -> None:
        if self._is_main:
            _set_handler(signal.SIGINT, self._previous)
            if self._struck is not None and callable(self._previous):
                self._previous(*self._struck)

    def _strike(self, number: int, frame: FrameType | None) -> None:
        self._struck = number, frame
