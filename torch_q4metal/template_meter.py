"""What a chat template may use: seconds on the clock, and characters for everything that it makes.

Templates come with models, so from strangers. The sandbox of jinja2 keeps them away from Python's
insides, but lets them run for ever and fill the memory. ``Meter`` is the second half:
template_sandbox.py has every loop step, call, filter, operator and piece of output report here,
*before* anything large is made.

Characters stand for bytes: making a string costs its length, making a container 8 for each element.
"""

import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from dataclasses import dataclass
from itertools import chain
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext

ELEMENT = 8
NODE = 64  # weight of one value in weigh(), which takes about 0.2 us to visit it
MAX_ITEMS = 100_000  # of one container; jinja2's sandbox has the same limit for range()
MAX_DEPTH = 100  # of containers in containers and of calls in calls: far from the C stack's end
MAX_INTEGER_BITS = 4096
_VIEWS = (list, tuple, KeysView, ValuesView, ItemsView)


@dataclass(frozen=True)
class RenderLimits:
    """Bounds of one rendering: wall-clock seconds, and characters of all that is made."""

    seconds: float = 5.0
    characters: int = 32 << 20


class OverLimitError(Exception):
    """A template used more than its limits; the message says of what."""


class Meter:
    """Counts one rendering's use; every method raises OverLimitError once a limit is passed."""

    def __init__(self, limits: RenderLimits) -> None:
        self.limits = limits
        self.left = limits.characters
        self.depth = 0
        self._deadline = time.monotonic() + limits.seconds

    def tick(self) -> None:
        """Look at the clock."""
        if time.monotonic() > self._deadline:
            raise OverLimitError(f"ran for more than {self.limits.seconds:g} s")

    def charge(self, characters: int) -> None:
        """Pay for something that is about to be made."""
        self.tick()
        self.left -= characters
        if self.left < 0:
            raise OverLimitError(f"made more than {self.limits.characters} characters of text")

    def each(self, iterable: Iterable[Any]) -> Iterator[Any]:
        """The items of ``iterable``, each paid for when it is taken."""
        for item in iterable:
            self.charge(ELEMENT)
            yield item

    def settle(self, value: Any) -> Any:
        """``value`` paid for, as the result of an operation; an iterator comes back metered."""
        if isinstance(value, str):
            self.charge(len(value))
        elif isinstance(value, (*_VIEWS, dict)):
            self.charge(ELEMENT * (1 + len(value)))
            self.weigh(value)
        elif isinstance(value, int):
            self.weigh(value)
        elif isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self.each(value)
        return value

    def weigh(self, value: Any, depth: int = 0) -> int:
        """Characters of ``value`` and all that it holds, counted at each place where it is held.

        Containers are weighed when the template builds them. So no list of lists of lists grows
        past the limit, however few bytes it takes, and to print, compare or hash one takes
        bounded time.
        """
        if isinstance(value, str):
            return NODE + len(value)
        if isinstance(value, int):
            if value.bit_length() > MAX_INTEGER_BITS:
                raise OverLimitError(f"made an integer of more than {MAX_INTEGER_BITS} bits")
            return NODE + value.bit_length() // 3
        if not isinstance(value, (*_VIEWS, dict)):
            return NODE  # all else prints and compares in constant time
        if len(value) > MAX_ITEMS:
            raise OverLimitError(f"made a list of more than {MAX_ITEMS} items")
        if depth == MAX_DEPTH:
            raise OverLimitError(f"nested lists more than {MAX_DEPTH} deep")
        self.tick()
        total = NODE
        for item in chain(value, value.values()) if isinstance(value, dict) else value:
            total += self.weigh(item, depth + 1)
            if total > self.limits.characters:
                raise OverLimitError(
                    f"made a list of more than {self.limits.characters} characters"
                )
        return total

    def text(self, value: Any) -> str:
        """``str(value)``, paid for before it is made."""
        if type(value) is str:
            self.charge(len(value))
            return value
        # repr() writes at most ten characters for one, as in '\U0001f600'
        self.charge(10 * self.weigh(value))
        return str(value)


def refuse(what: str) -> SecurityError:
    """The error for something that chat templates can't use, such as ``str.translate``."""
    return SecurityError(f"{what} is not available in chat templates")
