"""A text under way, and how its tokens are drawn from logits."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import cache as kv
from .sampling import LogitsProcessor, LogitsSampler, Sampler, SamplingParams, greedy

_numbers = itertools.count()


class Text:
    """One text under way.

    tokens     prompt and drawn tokens; ``cache`` holds the first of them
    sampling   how the next one is chosen; or None, then ``sampler`` and ``processors``, which only
               this process can call, do it
    logprobs   whether who draws wants to see the log-probabilities
    end        how many tokens it may get, the prompt's included; None: no limit
    next_token the next token, where it was chosen with the pass itself
    logits     [V] f32 for the next token, where they were computed and are not drawn from yet
    lane       what an engine keeps of it between passes
    number     tells it from all others of this process
    seed       of the random numbers that a device draws it with
    takes_likeliest  whether the likeliest token is all that anybody wants of the logits
    """

    def __init__(
        self,
        tokens: list[int],
        cache: kv.Sequence,
        sampling: SamplingParams | None,
        sampler: Sampler | None = None,
        processors: Iterable[LogitsProcessor] = (),
        *,
        logprobs: bool = True,
        end: int | None = None,
    ) -> None:
        self.tokens = tokens
        self.cache = cache
        self.sampling = sampling
        self.logprobs = logprobs
        self.end = end
        self.next_token: int | None = None
        self.logits: Tensor | None = None
        self.lane: Any = None
        self.number = next(_numbers)
        seed = None if sampling is None else sampling.seed
        self.seed = secrets.randbits(64) if seed is None else seed
        if sampling is None:
            self.choice = Choice(sampler or greedy, processors)
        else:
            self.choice = Choice.of(sampling)
        self.takes_likeliest = self.choice.is_greedy and not logprobs

    @property
    def waiting(self) -> list[int]:
        """Tokens that the cache does not hold yet."""
        return self.tokens[self.cache.length :]


class Choice:
    """Draws one text's tokens out of their logits; it keeps the random state."""

    def __init__(self, sampler: Sampler, processors: Iterable[LogitsProcessor]) -> None:
        self._sampler = sampler
        self._processors = list(processors)

    @classmethod
    def of(cls, sampling: SamplingParams) -> Choice:
        return cls(sampling.sampler(), sampling.logits_processors())

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the likeliest token of the logits as they are."""
        return self._sampler is greedy and not self._processors

    def draw(
        self, tokens: list[int], logits: Tensor, wants_logprobs: bool = True
    ) -> tuple[int, Tensor | None]:
        """(token, log-probabilities [V] f32 if wanted) after ``tokens``, of logits [V] f32."""
        for process in self._processors:
            logits = process(tokens, logits)
        if self._sampler is greedy:
            # Of 150,000 logits, log-probabilities take 0.4 ms, a twentieth of a small model's
            # token.
            return greedy(logits), torch.log_softmax(logits, -1) if wants_logprobs else None
        if isinstance(self._sampler, LogitsSampler) and not wants_logprobs:
            return self._sampler(logits), None
        logprobs = torch.log_softmax(logits, -1)
        return int(self._sampler(logprobs)), logprobs if wants_logprobs else None
