"""Text from a model: token by token, streamed, whole, or several at once. Names as in mlx-lm.

Every function works on a ``cache.Sequence``. One that is passed in is kept by the caller between
turns: only what it does not hold of the prompt is computed. A generator may be closed, or hit by
KeyboardInterrupt, at any time: the sequence then holds whole passes, with their tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import cache as kv
from .engine import engine_of
from .errors import ContextLengthError, Q4MetalError
from .memory import peak_memory
from .models.base import MATVEC_ROWS, CausalLM
from .models.loading import load_model
from .sampling import LogitsProcessor, Sampler, SamplingParams
from .stop_strings import StopStrings
from .text import Text

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerationResponse:
    """One token's worth of text.

    text               newly readable text; empty while characters or stop strings are incomplete
    token              the token that was drawn
    logprobs           [V] f32, of all tokens at this place; None if they were not asked for
    finish_reason      None, or in the last response "stop" (end token, stop string) or "length"
    prompt_tokens      tokens of the prompt, of which ``cached_tokens`` were in the cache already
    prompt_tps         computed prompt tokens a second, up to the first token
    generation_tokens  tokens drawn so far, this one included
    generation_tps     tokens a second since the first token; 0 at the first
    peak_memory        most bytes held so far, on MPS with the GPU's buffers (memory.py)
    """

    text: str
    token: int
    logprobs: Tensor | None
    finish_reason: str | None
    prompt_tokens: int
    cached_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: int


def load(
    path_or_id: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
    *,
    revision: str | None = None,
    offline: bool = False,
    max_kv_size: int | None = None,
    force: bool = False,
) -> tuple[CausalLM, Tokenizer]:
    """(model, tokenizer) of a directory or a Hugging Face id; see ``load_model`` for the options.

    ``revision`` and ``offline`` are for an id. Raises HubError, TokenizerError and what
    ``load_model`` raises.
    """
    from .hub import resolve_model
    from .tokenizer import Tokenizer

    path = resolve_model(str(path_or_id), revision=revision, offline=offline)
    tokenizer = Tokenizer.from_dir(path)
    model = load_model(path, dtype, device, precision, max_kv_size=max_kv_size, force=force)
    return model, tokenizer


def generate_step(
    prompt: Sequence[int] | Tensor,
    model: CausalLM,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Iterable[LogitsProcessor] = (),
    cache: kv.Sequence | None = None,
    logprobs: bool = True,
) -> Iterator[tuple[int, Tensor | None]]:
    """Yields (token, log-probabilities [V] f32) until ``max_tokens`` (-1: no limit) or the context
    is full. End tokens do not stop it. Without ``logprobs`` these are None, which saves a pipeline
    of several machines sending them; so does leaving ``sampler`` and ``logits_processors`` alone.

    ``cache`` ends up with the prompt and all tokens but the last. Raises ContextLengthError before
    anything is computed if the prompt is longer than the context.
    """
    processors = list(logits_processors)
    sampling = SamplingParams() if sampler is None and not processors else None
    row = _Row(
        model, _token_list(prompt), max_tokens, cache, sampling, sampler, processors,
        logprobs=logprobs,
    )  # fmt: skip
    row.prefill()
    while True:
        yield row.draw()
        if row.done:
            return
        row.step()


def stream_generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_tokens: int = 256,
    *,
    sampling: SamplingParams | None = None,
    stop: str | Iterable[str] = (),
    cache: kv.Sequence | None = None,
    extra_eos_token_ids: Iterable[int] = (),
    logprobs: bool = True,
) -> Iterator[GenerationResponse]:
    """Yields one response a token; the texts together are the answer, without any stop string.

    ``prompt``: text, or token ids (of a rendered chat, say). The end tokens are those of
    the config, the generation config and the tokenizer, and the extra ones. Without ``logprobs``
    the responses have none, which saves a pipeline of several machines sending them.
    """
    sampling = sampling or SamplingParams()
    begin = time.perf_counter()
    tokens = _encode(tokenizer, prompt)
    row = _Row(model, tokens, max_tokens, cache, sampling, logprobs=logprobs)
    prompt_tokens = len(tokens)
    cached_tokens = row.prefill()
    answer = _Answer(tokenizer, end_tokens(model, tokenizer, extra_eos_token_ids), stop)
    first = 0.0
    while True:
        token, token_logprobs = row.draw()
        text, finish_reason = answer.add(token, last=row.done)
        now = time.perf_counter()
        first = first or now
        yield GenerationResponse(
            text=text,
            token=token,
            logprobs=token_logprobs,
            finish_reason=finish_reason,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            prompt_tps=(prompt_tokens - cached_tokens) / (first - begin),
            generation_tokens=row.drawn,
            generation_tps=(row.drawn - 1) / (now - first) if now > first else 0.0,
            peak_memory=peak_memory(model.device),
        )
        if finish_reason is not None:
            return
        row.step()


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_tokens: int = 256,
    **options: Any,
) -> str:
    """The whole answer; options as for ``stream_generate``."""
    options = {"logprobs": False} | options
    responses = stream_generate(model, tokenizer, prompt, max_tokens, **options)
    return "".join(response.text for response in responses)


def generate_batch(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Iterable[str | Sequence[int]],
    max_tokens: int = 256,
    *,
    sampling: SamplingParams | None = None,
    stop: str | Iterable[str] = (),
    extra_eos_token_ids: Iterable[int] = (),
) -> list[str]:
    """The answers to several prompts, each the same as ``generate`` gives it, a seed included.

    Up to 8 are decoded together, for which weights are read once; one ends, the next one starts. In
    a pipeline they go in groups, so that no stage is idle.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    ends = end_tokens(model, tokenizer, extra_eos_token_ids)
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    answers = [_Answer(tokenizer, ends, stops) for _ in encoded]
    texts = [""] * len(encoded)

    def take(index: int, token: int, last: bool) -> bool:
        text, finish_reason = answers[index].add(token, last)
        texts[index] += text
        return finish_reason is not None

    decode_together(model, encoded, max_tokens, take, sampling=sampling)
    return texts


def decode_together(
    model: CausalLM,
    prompts: Sequence[list[int]],
    max_tokens: int,
    take: Callable[[int, int, bool], bool],
    *,
    sampling: SamplingParams | None = None,
) -> None:
    """Decodes several texts of token ids, up to 8 at a time.

    Calls ``take(index of the prompt, token, whether it is the text's last)`` for each token that is
    drawn; the text ends there if that returns True.
    """
    if not prompts:
        return
    sampling = sampling or SamplingParams()
    pool = _batch_pool(model, prompts, max_tokens)
    # Made before anything is computed: a prompt that is too long is told at once.
    waiting = [
        (index, _Row(model, tokens, max_tokens, kv.Sequence(pool), sampling, logprobs=False))
        for index, tokens in enumerate(prompts)
    ]
    waiting.reverse()
    engine = engine_of(model)
    groups = _Groups(min(len(waiting), MATVEC_ROWS), engine.groups)
    while waiting or groups.busy:
        group, size = groups.next()
        for entry in list(group):  # their last pass may still be under way, in other stages
            index, row = entry
            token, _ = row.draw()
            last = row.done
            if take(index, token, last) or last:
                row.cache.free()
                group.remove(entry)
        if group:
            engine.submit([row.text for _, row in group])
        while waiting and len(group) < size:
            group.append(waiting.pop())
            group[-1][1].prefill()


class _Groups:
    """Texts that are decoded together, in groups that take turns."""

    def __init__(self, texts: int, groups: int) -> None:
        shares = [texts // groups + (i < texts % groups) for i in range(groups)]
        self._sizes = [size for size in shares if size]
        self._groups: list[list[tuple[int, _Row]]] = [[] for _ in self._sizes]
        self._turn = -1

    @property
    def busy(self) -> bool:
        return any(self._groups)

    def next(self) -> tuple[list[tuple[int, _Row]], int]:
        """(the group whose turn it is, how many texts it takes)."""
        self._turn = (self._turn + 1) % len(self._groups)
        return self._groups[self._turn], self._sizes[self._turn]


def end_tokens(model: CausalLM, tokenizer: Tokenizer, extra: Iterable[int] = ()) -> frozenset[int]:
    """Ids that end an answer: those of both config files, of the tokenizer, and ``extra``."""
    config = model.checkpoint.config.eos_token_ids if model.checkpoint is not None else ()
    return frozenset((*config, *tokenizer.eos_token_ids, *extra))


class _Row:
    """One text under way, and how long it may get."""

    def __init__(
        self,
        model: CausalLM,
        prompt: list[int],
        max_tokens: int,
        cache: kv.Sequence | None,
        sampling: SamplingParams | None,
        sampler: Sampler | None = None,
        processors: Iterable[LogitsProcessor] = (),
        *,
        logprobs: bool,
    ) -> None:
        if not prompt:
            raise Q4MetalError("the prompt has no tokens; give it at least one.")
        if max_tokens == 0 or max_tokens < -1:
            raise Q4MetalError(f"max_tokens is {max_tokens}, but must be above 0, or -1: no limit.")
        if len(prompt) > model.max_kv_size:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens, but the context holds {model.max_kv_size}; "
                "shorten it or load the model with a larger max_kv_size."
            )
        if cache is None:
            longest = model.max_kv_size
            if max_tokens > 0:
                longest = min(longest, len(prompt) + max_tokens)
            cache = model.make_cache(longest)
        end = len(prompt) + max_tokens if max_tokens > 0 else None
        self.text = Text(prompt, cache, sampling, sampler, processors, logprobs=logprobs, end=end)
        self.cache = cache
        self.drawn = 0
        self._model = model
        self._engine = engine_of(model)
        self._limit = max_tokens

    @property
    def done(self) -> bool:
        """Whether ``max_tokens`` are drawn, or the next pass would not fit into the context."""
        full = len(self.text.tokens) > self._model.max_kv_size or self.cache.room == 0
        return self.drawn == self._limit or full

    def prefill(self) -> int:
        """Computes what the cache does not hold of the prompt; returns how much it did hold."""
        cached = _common_prefix(self.cache.tokens, self.text.tokens)
        self.cache.truncate(cached)
        self.step()
        return cached

    def step(self) -> None:
        """Begins the next token."""
        self._engine.submit([self.text])

    def draw(self) -> tuple[int, Tensor | None]:
        """The next token and its log-probabilities, if they are wanted."""
        token, logprobs = self._engine.draw(self.text)
        self.text.tokens.append(token)
        self.drawn += 1
        return token, logprobs if self.text.logprobs else None


class _Answer:
    """Turns tokens into text that may be shown, and knows when the answer ends."""

    def __init__(
        self, tokenizer: Tokenizer, end_tokens: frozenset[int], stop: str | Iterable[str]
    ) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._end_tokens = end_tokens
        self._stops = StopStrings([stop] if isinstance(stop, str) else stop)

    def add(self, token: int, last: bool) -> tuple[str, str | None]:
        """(new text, finish_reason or None); ``last``: no token follows this one."""
        ended = token in self._end_tokens
        piece = "" if ended else self._detokenizer.add(token)
        if ended or last:
            piece += self._detokenizer.finish()
        text, stopped = self._stops.add(piece)
        if stopped:
            return text, "stop"
        if ended or last:
            return text + self._stops.finish(), "stop" if ended else "length"
        return text, None


def _encode(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """Token ids; special ones are added unless the text begins with the first of them already."""
    if not isinstance(prompt, str):
        return _token_list(prompt)
    bos = tokenizer.bos_token
    return tokenizer.encode(prompt, add_special_tokens=not (bos and prompt.startswith(bos)))


def _token_list(prompt: Sequence[int] | Tensor) -> list[int]:
    return [int(token) for token in prompt]


def _common_prefix(held: list[int], prompt: list[int]) -> int:
    """How many tokens both begin with, the prompt's last one left out: its logits are needed."""
    longest = min(len(held), len(prompt) - 1)
    return next((i for i in range(longest) if held[i] != prompt[i]), longest)


def _batch_pool(model: CausalLM, prompts: Sequence[list[int]], max_tokens: int) -> kv.KVPool:
    """Room for the longest texts that can be under way at once."""
    longest = [
        min(model.max_kv_size, len(prompt) + max_tokens) if max_tokens > 0 else model.max_kv_size
        for prompt in prompts
    ]
    blocks = sorted((kv.blocks_for(length) for length in longest), reverse=True)
    return model.make_pool(sum(blocks[:MATVEC_ROWS]) * kv.BLOCK)
