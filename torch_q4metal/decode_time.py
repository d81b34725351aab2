"""How long a model takes for prompts and for the tokens after them."""

from __future__ import annotations

import time

from .generation import decode_together
from .models.base import CausalLM


def time_decoding(model: CausalLM, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """(seconds until all texts have a token, tokens a second of all together after that).

    Greedy, ``tokens`` for each of the prompts, past end tokens.
    """
    times: list[float] = []
    begun: set[int] = set()
    first = 0

    def take(index: int, token: int, last: bool) -> bool:
        nonlocal first
        times.append(time.perf_counter())
        if index not in begun:
            begun.add(index)
            first = len(times) - 1
        return False

    begin = time.perf_counter()
    decode_together(model, [list(prompt) for prompt in prompts], tokens, take)
    later = len(times) - 1 - first
    return times[first] - begin, later / (times[-1] - times[first])
