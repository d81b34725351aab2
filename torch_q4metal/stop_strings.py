"""Stop strings that never leak: text that may turn out to begin one is held back."""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """Passes streamed text on, up to the first stop string. How the text is cut does not matter."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """(what may be shown now, whether a stop string is complete); after True, the end."""
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stops]
        # Of several, the one that is complete first.
        ends = [(start + len(stop), start) for start, stop in found if start >= 0]
        if ends:
            shown = self._held[: min(ends)[1]]
            self._held = ""
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
