"""Conversations without a terminal: messages and KV cache agree, whatever happens."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence import assert_one_sentence
from speaking import write_speaking
from tiny import write_tiny

from torch_q4metal.cache import Sequence
from torch_q4metal.chat_session import ChatSession, TurnStats
from torch_q4metal.errors import ContextLengthError, TokenizerError
from torch_q4metal.generation import GenerationResponse, stream_generate
from torch_q4metal.models import load_model
from torch_q4metal.sampling import SamplingParams
from torch_q4metal.tokenizer import Tokenizer


class Watched(Sequence):
    """A KV cache that tells ``watch`` the tokens of each pass, just before it takes them."""

    watch: Callable[[list[int]], None]

    def append(self, tokens: Iterable[int]) -> None:
        tokens = list(tokens)
        self.watch(tokens)
        super().append(tokens)


class Bench:
    """A tiny model, sessions on it, the tokens of its passes and what they were drawn from."""

    def __init__(self, path: Path, context: int = 512) -> None:
        self.model = load_model(path, torch.float32, max_kv_size=context)
        self.tokenizer = Tokenizer.from_dir(path)
        self.passes: list[list[int]] = []
        self.logprobs: list[torch.Tensor] = []
        self.model.make_cache = self._cache  # type: ignore[method-assign]
        self._strike: tuple[int, BaseException] | None = None

    def session(self, **options: Any) -> ChatSession:
        options = {"max_tokens": 12, "stream": self._stream} | options
        return ChatSession(self.model, self.tokenizer, **options)

    def strike_at(self, number: int, error: BaseException) -> None:
        """Raise ``error`` at the end of the pass with this number, counted from now."""
        self._strike = (len(self.passes) + number, error)

    def _cache(self, max_tokens: int | None = None) -> Watched:
        cache = Watched(self.model.make_pool(max_tokens))
        cache.watch = self._watch
        return cache

    def _watch(self, tokens: list[int]) -> None:
        self.passes.append(tokens)
        if self._strike and self._strike[0] == len(self.passes):
            raise self._strike[1]

    def _stream(self, *arguments: Any, **options: Any) -> Iterator[GenerationResponse]:
        for response in stream_generate(*arguments, **options | {"logprobs": True}):
            self.logprobs.append(response.logprobs)
            yield response


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and waiting for a busy core costs a lot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(write_tiny(tmp_path / "model", "llama").path)


@pytest.fixture
def endless(tmp_path: Path) -> Bench:
    """Answers 0123012301... forever."""
    return Bench(write_speaking(tmp_path / "model", "0123", endless=True), context=128)


def answer(session: ChatSession, text: str) -> str:
    return "".join(session.ask(text))


def assert_like_fresh(bench: Bench, session: ChatSession) -> None:
    """The next answer is that of a session which computes the same conversation from nothing."""
    fresh = bench.session()
    fresh.messages = list(session.messages)
    bench.logprobs.clear()
    kept_answer = answer(session, "and now?")
    kept_logprobs = torch.stack(bench.logprobs)
    bench.logprobs.clear()
    assert answer(fresh, "and now?") == kept_answer
    torch.testing.assert_close(torch.stack(bench.logprobs), kept_logprobs, atol=1e-4, rtol=0)
    assert session.last is not None
    assert fresh.last is not None
    assert session.last.prompt_tokens == fresh.last.prompt_tokens
    assert fresh.last.cached_tokens == 0


def test_messages_hold_what_was_said(endless: Bench) -> None:
    session = endless.session(system_prompt="Be brief.")
    pieces = list(session.ask("hello"))
    assert len(pieces) > 1
    assert session.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "".join(pieces)},
    ]


def test_a_turn_computes_only_its_new_tokens(endless: Bench) -> None:
    session = endless.session()
    answer(session, "first")
    held = session.cached_tokens
    first = session.last
    assert first is not None
    assert held == first.prompt_tokens + 12 - 1  # the last token of an answer is not computed
    endless.passes.clear()
    answer(session, "second")
    last = session.last
    assert last is not None
    assert last.cached_tokens == held
    assert len(endless.passes[0]) == last.prompt_tokens - held
    rendered = endless.tokenizer.encode_chat(session.messages[:-1])
    assert endless.passes[0] == rendered[held:]


def test_the_kept_cache_changes_no_answer(bench: Bench) -> None:
    session = bench.session(system_prompt="Be brief.")
    for question in ("hello", "what?", "é 世界"):
        answer(session, question)
    assert_like_fresh(bench, session)
    assert session.last is not None
    assert session.last.cached_tokens > 0


def test_an_answer_that_is_closed_stays_as_far_as_it_came(endless: Bench) -> None:
    session = endless.session()
    pieces = session.ask("hello")
    begun = "".join(islice(pieces, 3))
    pieces.close()
    assert session.messages[-1] == {"role": "assistant", "content": begun}
    assert session.last is not None
    assert session.last.finish_reason == "interrupted"
    assert_like_fresh(endless, session)


def test_ctrl_c_within_a_pass_keeps_the_answer_before_it(endless: Bench) -> None:
    session = endless.session()
    endless.strike_at(5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        answer(session, "hello")
    assert session.messages[-1] == {"role": "assistant", "content": "0123"}
    assert session.last is not None
    assert session.last.finish_reason == "interrupted"
    assert_like_fresh(endless, session)


def test_ctrl_c_before_the_answer_begins_leaves_no_trace(bench: Bench) -> None:
    session = bench.session()
    answer(session, "hello")
    before = list(session.messages)
    bench.strike_at(1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        answer(session, "again")
    assert session.messages == before
    assert session.last is None
    assert_like_fresh(bench, session)


def test_a_failure_leaves_no_trace(bench: Bench) -> None:
    session = bench.session()
    answer(session, "hello")
    before = list(session.messages)
    bench.strike_at(3, RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        answer(session, "again")
    assert session.messages == before
    assert session.last is None
    assert_like_fresh(bench, session)


def test_max_tokens_and_a_full_context_are_told_apart(endless: Bench) -> None:
    session = endless.session(max_tokens=20)
    answer(session, "hello")
    assert session.last is not None
    assert session.last.finish_reason == "length"
    assert session.last.completion_tokens == 20
    session.max_tokens = 1000
    answer(session, "hello")
    assert session.last.finish_reason == "context"
    assert session.last.completion_tokens < 1000


def test_a_full_context_is_one_sentence_and_loses_nothing(endless: Bench) -> None:
    session = endless.session(max_tokens=1000, system_prompt="Count.")
    answer(session, "hello")
    before, held = list(session.messages), session.cached_tokens
    with pytest.raises(ContextLengthError) as caught:
        answer(session, "more")
    assert_one_sentence(caught.value, "the conversation", "128")
    assert (session.messages, session.cached_tokens) == (before, held)
    session.reset()
    assert session.messages == [{"role": "system", "content": "Count."}]
    assert session.cached_tokens == 0
    assert answer(session, "hello").startswith("0123")


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(endless: Bench) -> None:
    session = endless.session(stop=["23"])
    assert answer(session, "hello") == "01"
    assert session.messages[-1]["content"] == "01"
    assert session.last is not None
    assert session.last.finish_reason == "stop"
    session.stop = ()
    assert_like_fresh(endless, session)


def test_an_extra_end_token_ends_the_answer(endless: Bench) -> None:
    session = endless.session(extra_eos_token_ids=[ord("2")])
    assert answer(session, "hello") == "01"


def test_the_system_prompt_can_change_midway(bench: Bench) -> None:
    session = bench.session(system_prompt="Be brief.")
    answer(session, "hello")
    session.system_prompt = "Be long."
    assert session.system_prompt == "Be long."
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]
    assert_like_fresh(bench, session)
    session.system_prompt = None
    assert session.messages[0]["role"] == "user"


def test_a_seed_gives_equal_conversations_and_unequal_turns(bench: Bench) -> None:
    def talk(seed: int | None) -> list[str]:
        session = bench.session(sampling=SamplingParams(temperature=1.0, seed=seed))
        return [answer(session, "hello") for _ in range(2)]

    assert talk(3) == talk(3)
    assert talk(3) != talk(4)
    seeds: list[int | None] = []
    plain = bench.session(sampling=SamplingParams(temperature=1.0, seed=3))
    stream = plain._stream

    def record(*args: Any, sampling: SamplingParams, **options: Any) -> Iterator[Any]:
        seeds.append(sampling.seed)
        return stream(*args, sampling=sampling, **options)

    plain._stream = record
    answer(plain, "hello")
    answer(plain, "hello")
    assert seeds == [3, 4]


def test_without_a_template_each_prompt_is_continued_on_its_own(bench: Bench) -> None:
    session = bench.session(use_template=False)
    first = answer(session, "once upon")
    assert bench.passes[0] == list(b"once upon")
    answer(session, "elsewhere")
    assert session.messages == []
    assert answer(session, "once upon") == first


def test_a_template_that_refuses_changes_nothing(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "model").path
    refusing = "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}hi"
    bench = Bench(path)
    bench.tokenizer = Tokenizer.from_dir(path, chat_template=refusing)
    session = bench.session()
    answer(session, "hello")
    before = list(session.messages)
    with pytest.raises(TokenizerError, match="too long"):
        answer(session, "hello")
    assert session.messages == before


def test_statistics_in_one_line() -> None:
    stats = TurnStats(50, 38, 120.04, 7, 61.25, 412_000_000, "stop")
    assert str(stats) == (
        "prompt 12 tok (+38 cached) @ 120.0 tok/s, generation 7 tok @ 61.2 tok/s, "
        "peak memory 0.41 GB"
    )
    assert "cached" not in str(TurnStats(50, 0, 120.0, 7, 61.2, 412_000_000, "stop"))
