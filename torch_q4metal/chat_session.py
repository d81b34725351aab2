"""A conversation with a model: its messages, and the KV cache that is kept from turn to turn.

Knows no terminal. Every turn renders the whole conversation, but only the tokens that the cache
does not hold are computed: it keeps the longest common prefix.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

from .errors import ContextLengthError
from .generation import GenerationResponse, stream_generate
from .models import CausalLM
from .sampling import SamplingParams
from .tokenizer import Tokenizer

Message = dict[str, str]


@dataclass(frozen=True)
class TurnStats:
    """What the last turn cost. Speeds in tokens per second, ``peak_memory`` in bytes.

    ``prompt_tokens`` counts the whole rendered conversation, of which ``cached_tokens`` were
    held already and not computed again. ``finish_reason`` is ``stop``, ``length`` (``max_tokens``
    reached), ``context`` (the context is full) or ``interrupted``.
    """

    prompt_tokens: int
    cached_tokens: int
    prompt_tps: float
    completion_tokens: int
    generation_tps: float
    peak_memory: int
    finish_reason: str

    def __str__(self) -> str:
        cached = f" (+{self.cached_tokens} cached)" if self.cached_tokens else ""
        return (
            f"prompt {self.prompt_tokens - self.cached_tokens} tok{cached}"
            f" @ {self.prompt_tps:.1f} tok/s, "
            f"generation {self.completion_tokens} tok @ {self.generation_tps:.1f} tok/s, "
            f"peak memory {self.peak_memory / 1e9:.2f} GB"
        )


class ChatSession:
    """Messages, sampling settings and one KV-cache sequence of ``model``.

    ``stream`` is called as ``generation.stream_generate`` is, the default.
    With ``use_template=False`` every prompt is completed as plain text, on its own.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        sampling: SamplingParams | None = None,
        max_tokens: int = 2048,
        stop: Sequence[str] = (),
        extra_eos_token_ids: Sequence[int] = (),
        system_prompt: str | None = None,
        use_template: bool = True,
        stream: Callable[..., Iterator[GenerationResponse]] = stream_generate,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.sampling = SamplingParams() if sampling is None else sampling
        self.max_tokens, self.use_template = max_tokens, use_template
        self.stop, self.extra_eos_token_ids = tuple(stop), tuple(extra_eos_token_ids)
        self.messages: list[Message] = []
        self.system_prompt = system_prompt
        self.last: TurnStats | None = None
        self._cache = model.make_cache()
        self._stream = stream

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may take together."""
        return self.model.max_kv_size

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return self._cache.length

    @property
    def system_prompt(self) -> str | None:
        """The system message that opens the conversation, or None."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first and first["role"] == "system" else None

    @system_prompt.setter
    def system_prompt(self, text: str | None) -> None:
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def reset(self) -> None:
        """Forget the conversation and the cache; the system prompt stays."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.last = None
        self._cache.truncate(0)

    def close(self) -> None:
        """End what its model runs in other processes."""
        if self.model.engine is not None:
            self.model.engine.close()

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yield the pieces of the answer to ``text``; close the iterator to stop it early.

        An answer that was stopped (closed, or KeyboardInterrupt) stays in the conversation as far
        as it came. One that had not begun leaves no trace, nor does one that failed. ``last`` says
        afterwards what the turn cost, and is None if there was no answer.

        Raises:
            ContextLengthError: the conversation leaves no room for an answer.
            TokenizerError: the chat template refuses the conversation.
        """
        self.last = None
        turn = [*self.messages, {"role": "user", "content": text}]
        prompt = self._encode(turn, text)
        if len(prompt) >= self.context:
            raise ContextLengthError(
                f"the conversation takes {len(prompt)} tokens and the context holds "
                f"{self.context}, which leaves no room for an answer."
            )
        answer: list[str] = []
        last: GenerationResponse | None = None
        reason: str | None = None
        try:
            for response in self._stream(
                self.model,
                self.tokenizer,
                prompt,
                self.max_tokens,
                sampling=self._turn_sampling(),
                stop=self.stop,
                cache=self._cache,
                extra_eos_token_ids=self.extra_eos_token_ids,
                logprobs=False,
            ):
                last = response
                answer.append(response.text)
                if response.text:
                    yield response.text
            if last is not None:
                reason = last.finish_reason
                if reason == "length" and last.generation_tokens < self.max_tokens:
                    reason = "context"
        except (GeneratorExit, KeyboardInterrupt):
            reason = "interrupted" if any(answer) else None
            raise
        finally:
            if last is not None and reason:
                self.last = _stats(last, reason)
                if self.use_template:
                    self.messages = [*turn, {"role": "assistant", "content": "".join(answer)}]

    def _encode(self, turn: list[Message], text: str) -> list[int]:
        if self.use_template:
            return list(self.tokenizer.encode_chat(turn, add_generation_prompt=True))
        return list(self.tokenizer.encode(text))

    def _turn_sampling(self) -> SamplingParams:
        """A given seed counts up with the turns, or every answer would draw the same numbers."""
        if self.sampling.seed is None:
            return self.sampling
        answers = sum(message["role"] == "assistant" for message in self.messages)
        return replace(self.sampling, seed=self.sampling.seed + answers)


def _stats(last: GenerationResponse, reason: str) -> TurnStats:
    return TurnStats(
        prompt_tokens=last.prompt_tokens,
        cached_tokens=last.cached_tokens,
        prompt_tps=last.prompt_tps,
        completion_tokens=last.generation_tokens,
        generation_tps=last.generation_tps,
        peak_memory=last.peak_memory,
        finish_reason=reason,
    )
