"""What Metal asks of a kernel's parameters: numbers of buffers, types of positions."""

import re
from dataclasses import dataclass

from .lexer import MetalSyntaxError

_LAST_BUFFER = 30
_IN_GRID = {"thread_position_in_grid", "threads_per_grid"}
_IN_THREADGROUP = {
    "thread_position_in_threadgroup", "threads_per_threadgroup", "dispatch_threads_per_threadgroup",
}  # fmt: skip
_POSITIONS = {
    *_IN_GRID, *_IN_THREADGROUP, "threadgroup_position_in_grid", "threadgroups_per_grid",
}  # fmt: skip


@dataclass
class Argument:
    """A kernel's parameter: its text without attribute, the attribute and what stands in it."""

    declaration: str
    attribute: str
    index: str
    guard: str  # the function constant that says whether it is bound

    @property
    def name(self) -> str:
        """The last word of the declaration."""
        return str(re.findall(r"\w+", self.declaration)[-1])

    @property
    def type(self) -> str:
        """The rest of it, but for ``const`` and the namespace."""
        return re.sub(r"\bconst\b|metal::|\w+$|\s", "", self.declaration)


def check(arguments: list[Argument], place: str) -> None:
    """Raises MetalSyntaxError where Metal rejects the kernel at ``place`` for its parameters."""
    _check_numbers(arguments, place)
    positions = [a for a in arguments if a.attribute in _POSITIONS]
    for a in arguments:
        if a.attribute in ("buffer", "threadgroup"):
            continue
        lengths, words = ("[23]?", " or 2 or 3 of them") if a in positions else ("", "")
        if not re.fullmatch(rf"(ushort|uint){lengths}", a.type):
            raise MetalSyntaxError(
                f"{place}: '{a.declaration}': {a.attribute} is a ushort or uint{words}"
            )
    if len({a.type[-1] for a in positions if a.type[-1].isdigit()}) > 1:
        raise MetalSyntaxError(f"{place}: positions and sizes are vectors of different lengths")
    for group in (_IN_GRID, _IN_THREADGROUP):
        same = [a for a in positions if a.attribute in group]
        if len({a.type for a in same}) > 1:
            words = " and ".join(f"'{a.declaration}'" for a in same)
            raise MetalSyntaxError(f"{place}: {words} have to be of one type")


def _check_numbers(arguments: list[Argument], place: str) -> None:
    numbers = [int(a.index) for a in arguments if a.attribute == "buffer" and a.index.isdigit()]
    for n in numbers:
        if n > _LAST_BUFFER:
            raise MetalSyntaxError(f"{place}: buffer({n}): Metal has 0 to {_LAST_BUFFER}")
        if numbers.count(n) > 1:
            raise MetalSyntaxError(f"{place}: buffer({n}) is bound twice")
