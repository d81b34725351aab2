"""Which layers each stage gets: pure arithmetic, no ranks, no files.

The slowest stage sets the pace, so its time is what ``split_layers`` minimises, exactly, by dynamic
programming over contiguous ranges. A stage never gets more than its memory holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import MemoryLimitError, Q4MetalError


@dataclass(frozen=True)
class LayerCost:
    """``work``: bytes of weights read for a token. ``memory``: bytes held, KV cache included."""

    work: float
    memory: float


@dataclass(frozen=True)
class Capacity:
    """``speed``: bytes of weights that a stage reads in a second. ``memory``: bytes it may hold."""

    speed: float
    memory: float


NOTHING = LayerCost(0, 0)
_ROUNDING = 1 + 1e-9  # sums of floats in another order differ by that much


def split_layers(
    layers: Sequence[LayerCost],
    capacities: Sequence[Capacity],
    *,
    first: LayerCost = NOTHING,
    last: LayerCost = NOTHING,
) -> list[range]:
    """One range of layers for each stage: contiguous, none empty, each layer in exactly one.

    ``first`` and ``last`` are what the first stage (the embedding) and the last one (the head) hold
    and read besides. Of all splits that fit, one whose slowest stage is fastest; of those, the one
    whose stages' times are most even (least sum of squares).

    Raises Q4MetalError for more stages than layers, MemoryLimitError if no split fits.
    """
    count, stages = len(layers), len(capacities)
    _require_enough_layers(count, stages)
    if any(not capacity.speed > 0 for capacity in capacities):
        slow = next(i for i, capacity in enumerate(capacities) if not capacity.speed > 0)
        raise Q4MetalError(f"stage {slow} has a speed of {capacities[slow].speed}, not above 0.")
    work, memory = _sums([c.work for c in layers]), _sums([c.memory for c in layers])

    def seconds(stage: int, begin: int, end: int) -> float:
        """Time of a stage for the layers [begin, end); infinite if they do not fit into it."""
        ends = (first if stage == 0 else NOTHING, last if stage == stages - 1 else NOTHING)
        held = memory[end] - memory[begin] + sum(cost.memory for cost in ends)
        if held > capacities[stage].memory * _ROUNDING:
            return math.inf
        read = work[end] - work[begin] + sum(cost.work for cost in ends)
        return read / capacities[stage].speed

    slowest, _ = _best(count, stages, seconds, max)
    if slowest == math.inf:
        needed = memory[count] + first.memory + last.memory
        there = sum(capacity.memory for capacity in capacities)
        raise MemoryLimitError(
            f"{count} layers do not fit on {stages} stages: they need {needed / 1e9:.2f} GB "
            f"together, and {there / 1e9:.2f} GB are free, "
            f"{', '.join(f'{c.memory / 1e9:.2f}' for c in capacities)} GB a stage; take more "
            "machines, a shorter context (max_kv_size), or load it anyway with force."
        )

    def square(stage: int, begin: int, end: int) -> float:
        time = seconds(stage, begin, end)
        return time * time if time <= slowest * _ROUNDING else math.inf

    _, bounds = _best(count, stages, square, lambda total, more: total + more)
    return [range(begin, end) for begin, end in itertools.pairwise(bounds)]


def explicit_split(counts: Sequence[int], layers: int, stages: int) -> list[range]:
    """The ranges of ``--split 10,18``: so many layers for each stage, in their order.

    Raises Q4MetalError unless there is one count a stage, none below 1, that add up to ``layers``.
    """
    _require_enough_layers(layers, stages)
    shown = ",".join(map(str, counts))
    if len(counts) != stages:
        raise Q4MetalError(f"--split {shown} is for {len(counts)} stages, but there are {stages}.")
    if min(counts) < 1 or sum(counts) != layers:
        raise Q4MetalError(
            f"--split {shown} gives out {sum(counts)} layers, but the model has {layers}; each "
            "stage needs at least one."
        )
    bounds = [sum(counts[:i]) for i in range(stages + 1)]
    return [range(begin, end) for begin, end in itertools.pairwise(bounds)]


def _require_enough_layers(layers: int, stages: int) -> None:
    if stages < 1:
        raise Q4MetalError(f"a model needs at least one stage, not {stages}.")
    if stages > layers:
        raise Q4MetalError(
            f"{stages} stages are too many for a model of {layers} layers: each needs at least "
            f"one; start {layers} or fewer."
        )


def _sums(values: Sequence[float]) -> list[float]:
    """Sums of the first 0, 1, ... values."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums


def _best(
    layers: int,
    stages: int,
    cost: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """(least joined cost, the bounds of its ranges) over all ways to cut layers into stages.

    ``cost(stage, begin, end)`` is infinite where a range is not allowed; ``join`` never falls.
    """
    best = [0.0] + [math.inf] * layers  # by how many layers the stages so far cover
    choices = []
    for stage in range(stages):
        new, choice = [math.inf] * (layers + 1), [0] * (layers + 1)
        for end in range(stage + 1, layers - (stages - stage - 1) + 1):
            for begin in range(stage, end):
                if best[begin] == math.inf:
                    continue
                total = join(best[begin], cost(stage, begin, end))
                if total < new[end]:
                    new[end], choice[end] = total, begin
        best = new
        choices.append(choice)
    bounds = [layers]
    for choice in reversed(choices):
        bounds.append(choice[bounds[-1]])
    return best[layers], bounds[::-1]
