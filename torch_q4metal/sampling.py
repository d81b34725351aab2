"""From logits to a token, with mlx-lm's settings in mlx-lm's order.

The repetition penalty changes logits; top-p, min-p and top-k then filter the log-probabilities as
they are, and the temperature comes last. Hugging Face and OpenAI divide by the temperature first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _extension
from .errors import Q4MetalError

Sampler = Callable[[Tensor], int]
"""Log-probabilities [V] f32 -> token id."""
LogitsProcessor = Callable[[Sequence[int], Tensor], Tensor]
"""(all tokens so far, logits [V] f32) -> logits [V]."""

_NUCLEUS_GUESS = 512  # nearly always holds the nucleus; sorting a whole vocabulary takes 5 ms


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. The defaults are greedy.

    temperature              0: the most likely token; above it, tokens are drawn
    top_p                    keep the likeliest tokens that together have this probability; 1: all
    top_k                    keep so many tokens; 0: all
    min_p                    keep tokens with this share of the likeliest one's probability; 0: all
    repetition_penalty       recent tokens' logits are divided by it (negative: multiplied); 1: off
    repetition_context_size  how many tokens are recent, the prompt's included
    seed                     equal seeds draw equal text on equal devices (the CPU's random numbers
                             are not the GPU's); None: a new one each time

    Raises Q4MetalError for values that make no sense.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("top_k", 0, math.inf),
            ("repetition_context_size", 0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high or value == math.inf:
                span = f"between {low:g} and {high:g}" if high < math.inf else f"at least {low:g}"
                raise Q4MetalError(f"{name} is {value}, but must be {span}.")
        if not 0 < self.repetition_penalty < math.inf:
            raise Q4MetalError(
                f"repetition_penalty is {self.repetition_penalty}, but must be above 0 (1 is off)."
            )

    def sampler(self) -> Sampler:
        """A new sampler, which starts at the seed."""
        return make_sampler(
            self.temperature, self.top_p, self.min_p, top_k=self.top_k, seed=self.seed
        )

    def logits_processors(self) -> list[LogitsProcessor]:
        return make_logits_processors(self.repetition_penalty, self.repetition_context_size)


def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    *,
    top_k: int = 0,
    seed: int | None = None,
) -> Sampler:
    """A sampler with mlx-lm's arguments; 0 switches a filter off. It keeps its own random state."""
    if temp == 0:
        return greedy
    return FilteredSampler(temp, top_p, min_p, top_k, seed)


class LogitsSampler:
    """A sampler that takes logits [V] f32 as well as log-probabilities.

    ``draw(address of the logits, V, temperature, top_p, min_p, top_k, *numbers)`` gives the token
    for random ``numbers``, or -1 where none can be drawn.
    """

    def __init__(self, draw: Callable[..., int], *settings: float) -> None:
        self._draw, self._settings = draw, settings

    def draw(self, logits: Tensor, *numbers: float) -> int:
        if not (logits.is_cpu and logits.dtype == torch.float32 and logits.is_contiguous()):
            logits = logits.detach().to("cpu", torch.float32).contiguous()
        token = self._draw(logits.data_ptr(), len(logits), *self._settings, *numbers)
        if token < 0:
            raise Q4MetalError(
                f"no token can be drawn of {len(logits)} logits that are NaN or -inf; look at the "
                "sampler's and the processors' settings, or load the model with precision='exact'."
            )
        return token


class FilteredSampler(LogitsSampler):
    """Draws among the tokens that the filters leave, with a random state of its own.

    csrc/cpu/token_draw.cpp does what ``apply_filters`` says: right after a pass each call of torch
    takes 20 us and more, and weighing 150,000 tokens by such calls takes a millisecond.
    """

    def __init__(
        self, temperature: float, top_p: float, min_p: float, top_k: int, seed: int | None
    ) -> None:
        super().__init__(_extension.load().draw_token, temperature, top_p, min_p, top_k)
        self._random = random.Random(seed)

    def __call__(self, logits: Tensor) -> int:
        return self.draw(logits, self._random.random())


def _nucleus_size(weights: Tensor, total: Tensor, top_p: float) -> int:
    """How many tokens, likeliest first, it takes to have ``top_p`` of the ``total`` weight.

    ``weights`` f64 [N] are those of the likeliest tokens; N if they do not reach it.
    """
    above = weights.cumsum(0) - weights
    return max(int((above < top_p * total).sum()), 1)


def make_logits_processors(
    repetition_penalty: float | None = None, repetition_context_size: int = 20
) -> list[LogitsProcessor]:
    """The processors that these settings call for; None, 0 and 1 are no penalty."""
    if repetition_penalty in (None, 0, 1) or repetition_context_size == 0:
        return []
    penalty, window = float(repetition_penalty or 1), repetition_context_size

    def penalize(tokens: Sequence[int], logits: Tensor) -> Tensor:
        if not tokens:
            return logits
        values = logits.numpy(force=True).copy()  # few calls of torch: each takes 20 us here
        for token in set(tokens[-window:]):
            value = values[token]
            values[token] = value * penalty if value < 0 else value / penalty
        result = torch.from_numpy(values)
        return result if logits.is_cpu else result.to(logits.device)

    return [penalize]


def greedy(logprobs: Tensor) -> int:
    """The most likely token; of equals, the first."""
    return int(logprobs.argmax())


def apply_filters(logprobs: Tensor, top_p: float, min_p: float, top_k: int) -> Tensor:
    """Log-probabilities [V] with -inf for what the filters leave out; 0 switches one off."""
    if 0 < top_p < 1:
        logprobs = apply_top_p(logprobs, top_p)
    if min_p > 0:
        logprobs = apply_min_p(logprobs, min_p)
    if top_k > 0:
        logprobs = apply_top_k(logprobs, top_k)
    return logprobs


def apply_top_p(logprobs: Tensor, top_p: float) -> Tensor:
    """Log-probabilities [V] with -inf for all but the nucleus.

    A token stays if the tokens above it have less than ``top_p`` of the mass; of equal ones, all.
    """
    total = logprobs.double().exp().sum()  # in f32 the tail of a large vocabulary rounds away
    for count in (_NUCLEUS_GUESS, logprobs.shape[0]):
        best = logprobs.topk(min(count, logprobs.shape[0])).values
        kept = _nucleus_size(best.double().exp(), total, top_p)
        if kept < best.shape[0]:
            break
    return logprobs.masked_fill(logprobs < best[kept - 1], -math.inf)


def apply_min_p(logprobs: Tensor, min_p: float) -> Tensor:
    """Log-probabilities [V] with -inf where less than ``min_p`` of the likeliest token's."""
    return logprobs.masked_fill(logprobs < logprobs.max() + math.log(min_p), -math.inf)


def apply_top_k(logprobs: Tensor, top_k: int) -> Tensor:
    """Log-probabilities [V] with -inf for all but the ``top_k`` likeliest."""
    if top_k >= logprobs.shape[0]:
        return logprobs
    best = logprobs.topk(top_k)
    return torch.full_like(logprobs, -math.inf).scatter(0, best.indices, best.values)
