"""Test cases that hold every pair of values of their factors at least once, chosen by a seed."""

import random
from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any

Choice = dict[str, Any]  # the values of one or more factors
_Pair = tuple[tuple[str, Any], tuple[str, Any]]

_TRIES = 40  # random completions of a pair, of which the one that covers most is kept


def choices(**factors: Sequence[Any]) -> list[list[Choice]]:
    """One block for each factor: what ``pairwise`` takes."""
    return [[{name: value} for value in values] for name, values in factors.items()]


def pairs_of(case: Choice) -> set[_Pair]:
    """The pairs of values in a case."""
    return set(combinations(sorted(case.items(), key=lambda item: item[0]), 2))


def pairwise(
    blocks: Sequence[Sequence[Choice]],
    possible: Callable[[Choice], bool] = lambda case: True,
    seed: int = 0,
) -> list[Choice]:
    """Cases, each with one choice of every block, that hold every pair of values that is possible.

    Pairs between two blocks count, and pairs inside a choice. A pair for which no completion is
    found among ``_TRIES`` random ones is taken as impossible.
    """
    source = random.Random(seed)
    wanted: set[_Pair] = set()
    for first, second in combinations(blocks, 2):
        for a, b in product(first, second):
            wanted |= pairs_of(a | b)
    cases: list[Choice] = []
    for pair in sorted(wanted, key=repr):
        if pair not in wanted:
            continue
        fitting = [_fitting(block, dict(pair)) for block in blocks]
        if not all(fitting):
            continue
        candidates = [_join([source.choice(block) for block in fitting]) for _ in range(_TRIES)]
        found = [case for case in candidates if possible(case)]
        if found:
            best = max(found, key=lambda case: len(pairs_of(case) & wanted))
            wanted -= pairs_of(best)
            cases.append(best)
    return cases


def _fitting(block: Sequence[Choice], values: Choice) -> list[Choice]:
    """The choices of a block that do not contradict these values."""
    return [c for c in block if all(c.get(name, value) == value for name, value in values.items())]


def _join(parts: Sequence[Choice]) -> Choice:
    return {name: value for part in parts for name, value in part.items()}
