"""What computes the next tokens of texts: this process, or a pipeline of several."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from . import cache as kv
from . import decode
from .models.base import CausalLM
from .sampling import LogitsProcessor, Sampler, SamplingParams, greedy

_numbers = itertools.count()


class Text:
    """One text under way.

    tokens     prompt and drawn tokens; ``cache`` holds the first of them
    sampling   how the next one is chosen; or None, then ``sampler`` and ``processors``, which only
               this process can call, do it
    logprobs   whether who draws wants to see the log-probabilities
    logits     [V] f32 for the next token, where they were computed and are not drawn from yet
    number     tells it from all others of this process
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
    ) -> None:
        self.tokens = tokens
        self.cache = cache
        self.sampling = sampling
        self.logprobs = logprobs
        self.logits: Tensor | None = None
        self.number = next(_numbers)
        if sampling is None:
            self.choice = Choice(sampler or greedy, processors)
        else:
            self.choice = Choice.of(sampling)

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

    def draw(self, tokens: list[int], logits: Tensor) -> tuple[int, Tensor]:
        """(token, log-probabilities [V] f32) after ``tokens``, of logits [V] f32."""
        for process in self._processors:
            logits = process(tokens, logits)
        logprobs = torch.log_softmax(logits, -1)
        return int(self._sampler(logprobs)), logprobs


class Engine(Protocol):
    """Computes in the order of ``submit``. A text has at most one pass under way.

    ``stages``  of a pipeline, what each rank has loaded: "rank", "host", "layers", "weight_bytes"
    """

    stages: list[dict[str, Any]]

    @property
    def groups(self) -> int:
        """How many passes are worth having under way at once."""

    def submit(self, texts: list[Text]) -> None:
        """Begins the next token of texts [B]: their waiting tokens go into their caches.

        Raises ContextLengthError, before anything is computed, if one has no room for them.
        """

    def draw(self, text: Text) -> tuple[int, Tensor | None]:
        """(next token, log-probabilities [V] f32 or None) of a text that was submitted.

        The token is not appended to ``tokens``.
        """

    def close(self) -> None:
        """Ends what runs elsewhere."""


class LocalEngine:
    """The model of this process."""

    groups = 1

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self.stages: list[dict[str, Any]] = []

    @torch.inference_mode()
    def submit(self, texts: list[Text]) -> None:
        ids, caches = [text.waiting for text in texts], [text.cache for text in texts]
        logits = decode.forward(self._model, ids, caches).cpu()
        for text, own in zip(texts, logits, strict=True):
            text.logits = own

    def draw(self, text: Text) -> tuple[int, Tensor | None]:
        assert text.logits is not None, "it was not submitted"
        return text.choice.draw(text.tokens, text.logits)

    def close(self) -> None:
        """Nothing runs elsewhere."""


def engine_of(model: CausalLM) -> Engine:
    """The pipeline that the model is a stage of, or its own process."""
    return LocalEngine(model) if model.engine is None else model.engine
