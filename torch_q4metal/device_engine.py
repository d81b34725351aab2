"""Next tokens by a model on a GPU that draws them itself.

A token's id stays on the device, where the next pass reads it, and reaches the host one pass late:
while the host looks at a token, and decides that the text goes on, the pass after it is under way
already. Where the text ends, that one was in vain: what it wrote to the cache is not counted.

Tokens whose log-probabilities somebody wants to see, or that take more than the sampling kernel can
do (penalties, samplers in Python), are drawn on the CPU, without looking ahead; a seed stands for
the same random numbers there.
"""

from __future__ import annotations

import weakref
from collections import deque

import torch
from torch import Tensor

from . import device_sampling
from .cache import blocks_for
from .decode_mps import MetalDecodePlan
from .errors import Q4MetalError
from .local_engine import LocalEngine
from .models.base import MATVEC_ROWS, PREFILL_CHUNK, CausalLM
from .models.rope import RopeConfig
from .text import Choice, Text

_AHEAD = 32
"""Passes whose positions and blocks are on the device before they are needed."""


class DeviceEngine(LocalEngine):
    """The model of this process, on MPS."""

    def __init__(self, model: CausalLM, plan: MetalDecodePlan) -> None:
        super().__init__(model)
        self._plan = plan

    @torch.inference_mode()
    def submit(self, texts: list[Text]) -> None:
        """As ``Engine.submit``. Returns when passes are queued whose tokens the device draws."""
        together: dict[tuple[bool, int], list[Text]] = {}
        for text in texts:
            self._model.check_context(len(text.tokens))
            text.cache.reserve(len(text.waiting))
            key = _is_drawn_on_device(text), id(text.cache.pool)
            together.setdefault(key, []).append(text)
        for (on_device, _), group in together.items():
            if on_device:
                self._queue(group)
            else:
                self._compute_logits(group)

    @torch.inference_mode()
    def draw(self, text: Text) -> tuple[int, Tensor | None]:
        """As ``Engine.draw``. Waits for the text's pass, with the next one queued behind it."""
        if not _is_drawn_on_device(text):
            return self._draw_here(text)
        assert isinstance(text.lane, _Lane), "it was not submitted"
        return text.lane.token_of(text), None

    def _draw_here(self, text: Text) -> tuple[int, Tensor | None]:
        sampling = text.sampling
        if sampling is None:
            return super().draw(text)
        assert text.logits is not None, "it was not submitted"
        sampler = device_sampling.sampler(sampling, text.seed, len(text.tokens) - 1)
        choice = Choice(sampler, sampling.logits_processors())
        return choice.draw(text.tokens, text.logits, text.logprobs)

    def _queue(self, texts: list[Text]) -> None:
        lane = texts[0].lane
        if not (isinstance(lane, _Lane) and lane.continues(texts)):
            self._read(texts)
            lane = _Lane(self._plan, self._model, texts)
            for text in texts:
                text.lane = lane
        lane.confirm(texts)

    def _compute_logits(self, texts: list[Text]) -> None:
        self._read(texts)
        last = torch.tensor([text.tokens[-1] for text in texts])
        caches = [text.cache for text in texts]
        for text, logits in zip(texts, self._plan.advance(last, caches, [1] * len(texts))):
            text.cache.append(text.waiting)
            text.logits = logits

    def _read(self, texts: list[Text]) -> None:
        """Puts all but the last waiting token of each text into its cache.

        Pieces too short for the kernels that read prompts go through the plan, token by token: each
        number of rows would want kernels of its own, and a second to compile them.
        """
        self._plan.check(len(texts))
        for text in texts:
            *tokens, _ = text.waiting
            while tokens:
                room = PREFILL_CHUNK - text.cache.length % PREFILL_CHUNK
                chunk, tokens = tokens[:room], tokens[room:]
                read = self._model.read if len(chunk) > MATVEC_ROWS else self._plan.read
                read(chunk, text.cache, len(text.tokens))


class _Lane:
    """Texts [R] that are decoded together, and what their passes need on the device.

    Pass number n reads its tokens where pass n - 1 left them and leaves its own at the other place.
    """

    _queued = _confirmed = _seen = 0  # passes

    def __init__(self, plan: MetalDecodePlan, model: CausalLM, texts: list[Text]) -> None:
        rows, device = len(texts), model.device
        longest = max(_longest(text, model.max_kv_size) for text in texts)
        self._plan = plan
        self._rope_config = model.config.rope
        self._max_kv_size = model.max_kv_size
        self._vocab_size = model.config.vocab_size
        self._texts = [weakref.ref(text) for text in texts]
        self._sampling = _settings(texts)
        self._tokens = torch.empty(2, rows, dtype=torch.int64, device=device)
        self._rope = torch.empty(_AHEAD, rows, 2, model.config.head_dim, device=device)
        self._tables = torch.empty(rows, blocks_for(longest), dtype=torch.int32, device=device)
        self._blocks: list[list[int]] = []  # what the tables hold
        self._first, self._passes = 0, 0  # the passes that the tables and rope are for
        self._drawn = torch.full((2, rows), -1)
        self._events = [torch.mps.Event(), torch.mps.Event()]
        self._sources: deque[Tensor] = deque(maxlen=8)  # uploads that may still be under way
        self._latest: list[int] = []  # tokens of pass number _seen - 1
        self._upload(torch.tensor([text.tokens[-1] for text in texts]), self._tokens[1])

    def __del__(self) -> None:
        if self._seen < self._queued:  # the GPU may still write to memory of the host that is here
            torch.mps.synchronize()

    def continues(self, texts: list[Text]) -> bool:
        """Whether the next pass of these texts follows the last one: same rows, its tokens."""
        return (
            [ref() for ref in self._texts] == texts
            and self._seen == self._confirmed
            and [text.waiting for text in texts] == [[token] for token in self._latest]
        )

    def confirm(self, texts: list[Text]) -> None:
        """The next pass is wanted: it counts, and is queued unless it is already."""
        if self._queued == self._confirmed:
            self._queue(texts)
        self._confirmed += 1
        for text in texts:
            text.cache.append(text.waiting)

    def token_of(self, text: Text) -> int:
        """The text's token out of the last pass that was confirmed."""
        texts = [ref() for ref in self._texts]
        alive = [other for other in texts if other is not None]
        if self._seen < self._confirmed:
            goes_on = len(alive) == len(texts) and all(map(self._may_go_on, alive))
            if goes_on and self._queued == self._confirmed:
                self._queue(alive)
            self._wait()
        return self._latest[texts.index(text)]

    def _may_go_on(self, text: Text) -> bool:
        """Whether a text whose next token is under way may get one more after that."""
        longer = len(text.tokens) + 1
        below_end = text.end is None or longer < text.end
        return below_end and longer <= self._max_kv_size and text.cache.room > 0

    def _queue(self, texts: list[Text]) -> None:
        """Queues the next pass, and the copy of its tokens to the host."""
        number = self._queued
        blocks = [text.cache.block_table for text in texts]
        if number >= self._first + self._passes or blocks != self._blocks:
            self._prepare(texts)
        here, before = number % 2, (number + 1) % 2
        self._drawn[here] = -1
        self._queued += 1
        self._plan.step(
            self._tokens[before],
            torch.tensor([text.cache.length for text in texts]),
            self._rope[number - self._first],
            self._tables,
            texts[0].cache.pool.slabs,
            self._tokens[here],
            self._sampling,
        )
        self._drawn[here].copy_(self._tokens[here], non_blocking=True)
        self._events[here].record()

    def _prepare(self, texts: list[Text]) -> None:
        """Uploads rope and block tables of the next passes, behind what is queued."""
        left = [_longest(text, self._max_kv_size) - text.cache.length for text in texts]
        count = min(_AHEAD, *left, *(text.cache.room for text in texts))
        for text in texts:
            text.cache.reserve(count)
        rows = [_rope_rows(self._rope_config, text.cache.length, count) for text in texts]
        self._upload(torch.stack(rows, 1), self._rope[:count])
        tables = torch.zeros(self._tables.shape, dtype=torch.int32)
        for row, text in zip(tables, texts, strict=True):
            blocks = torch.tensor(text.cache.block_table[: len(row)])
            row[: len(blocks)] = blocks
        self._upload(tables, self._tables)
        self._blocks = [list(text.cache.block_table) for text in texts]
        self._first, self._passes = self._queued, count

    def _upload(self, source: Tensor, target: Tensor) -> None:
        self._sources.append(source)
        target.copy_(source, non_blocking=True)

    def _wait(self) -> None:
        """Until the tokens of the pass after those that were seen are here."""
        here = self._seen % 2
        if self._queued == self._confirmed:  # nothing behind it has committed the event
            torch.mps.synchronize()
        else:
            self._events[here].synchronize()
        tokens = self._drawn[here].tolist()
        if min(tokens) < 0:
            raise RuntimeError("the GPU did not finish a pass; its driver may have reset it.")
        if max(tokens) >= self._vocab_size:  # what the kernels choose of nothing
            raise Q4MetalError(
                f"no token can be chosen of {self._vocab_size} logits that are NaN or -inf; look "
                "at the model's files, or load it with device='cpu'."
            )
        self._latest = tokens
        self._seen += 1


def _is_drawn_on_device(text: Text) -> bool:
    return text.sampling is not None and not text.logprobs and not text.sampling.logits_processors()


def _longest(text: Text, max_kv_size: int) -> int:
    """Positions that the text may take in its cache: its last token never gets there."""
    longest = min(max_kv_size, text.cache.pool.max_tokens)
    return longest if text.end is None else min(longest, max(1, text.end - 1))


def _settings(texts: list[Text]) -> Tensor | None:
    """int32 [R, 6], as the sampling kernel takes it; None if all take the likeliest token."""
    settings = [(text.sampling, text.seed) for text in texts if text.sampling is not None]
    assert len(settings) == len(texts)
    if all(sampling.temperature == 0 for sampling, _ in settings):
        return None
    return device_sampling.packed(settings)


def _rope_rows(rope: RopeConfig, start: int, count: int) -> Tensor:
    """f32 [count, 2, head_dim]: each position's row as at the end of its text."""
    if rope.rope_type == "dynamic":
        rows = [torch.stack(rope.rows(start + i, 1, start + i + 1), 1) for i in range(count)]
        return torch.cat(rows)
    return torch.stack(rope.rows(start, count, start + count), 1)
