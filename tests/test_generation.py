"""Generation: streaming, ends, stop strings, caches between turns, batches, interrupts."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from sentence import assert_one_sentence
from speaking import FIRST, write_speaking

from torch_q4metal import decode, hub
from torch_q4metal.cache import Sequence
from torch_q4metal.errors import ContextLengthError, Q4MetalError
from torch_q4metal.generation import (
    end_tokens,
    generate,
    generate_batch,
    generate_step,
    load,
    stream_generate,
)
from torch_q4metal.models import load_model
from torch_q4metal.sampling import SamplingParams
from torch_q4metal.tokenizer import Tokenizer

PROMPT = [FIRST]  # what a speaking model answers to
RANDOM = SamplingParams(temperature=1.5, top_p=0.95, top_k=60, seed=11, repetition_penalty=1.1)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny matrices gain nothing from threads, and waiting for a busy core costs a lot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    path = tiny.write_tiny(tmp_path_factory.mktemp("tiny") / "m").path
    return load(path, dtype=torch.float32)


def speaking(tmp_path, text, **options):
    return load(write_speaking(tmp_path / "m", text, **options))


def stream(model, tokenizer, prompt=PROMPT, **options):
    return list(stream_generate(model, tokenizer, prompt, **options))


def text_of(responses):
    return "".join(response.text for response in responses)


def test_load_gives_model_and_tokenizer(tmp_path, monkeypatch):
    path = tiny.write_tiny(tmp_path / "m").path
    asked = []

    def resolve(path_or_id, revision=None, offline=False):
        asked.append((path_or_id, revision, offline))
        return path

    monkeypatch.setattr(hub, "resolve_model", resolve)
    model, tokenizer = load(
        "some/model", torch.bfloat16, "cpu", "exact", revision="v1", offline=True, max_kv_size=99
    )
    assert asked == [("some/model", "v1", True)]
    assert (model.dtype, model.kv_dtype, model.max_kv_size) == (torch.bfloat16, torch.float32, 99)
    assert isinstance(tokenizer, Tokenizer)


def test_generate_step_is_the_model_s_argmax(tiny_model):
    """Against the plainest loop there is: the whole text anew for every token."""
    model, _ = tiny_model
    prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    ids, expected = list(prompt), []
    for _ in range(40):
        logits = model(torch.tensor([ids]))[0, -1]
        expected.append((int(logits.argmax()), torch.log_softmax(logits, -1)))
        ids.append(expected[-1][0])
    steps = list(generate_step(prompt, model, max_tokens=40))
    assert [token for token, _ in steps] == [token for token, _ in expected]
    for (_, logprobs), (_, wanted) in zip(steps, expected, strict=True):
        assert logprobs.shape == (tiny.VOCAB_SIZE,)
        torch.testing.assert_close(logprobs, wanted, rtol=1e-4, atol=1e-4)
        logprobs[0] = 0  # a caller's own, not a tensor of inference mode
    assert prompt == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert next(generate_step(torch.tensor(prompt), model))[0] == expected[0][0]
    without = list(generate_step(prompt, model, max_tokens=40, logprobs=False))
    assert without == [(token, None) for token, _ in expected]


def test_an_answer_ends_at_its_end_token(tmp_path):
    model, tokenizer = speaking(tmp_path, "Paris.")
    responses = stream(model, tokenizer)
    assert text_of(responses) == "Paris."
    assert [r.token for r in responses] == [*b"Paris.", tiny.EOS_ID]
    assert [r.finish_reason for r in responses] == [None] * 6 + ["stop"]
    assert [r.generation_tokens for r in responses] == list(range(1, 8))
    assert all((r.prompt_tokens, r.cached_tokens) == (1, 0) for r in responses)
    assert responses[0].generation_tps == 0
    assert responses[-1].generation_tps > 0
    assert responses[0].prompt_tps == responses[-1].prompt_tps > 0
    assert responses[-1].peak_memory > 50e6
    assert responses[0].logprobs.exp().sum() == pytest.approx(1, abs=1e-5)
    assert generate(model, tokenizer, PROMPT) == "Paris."
    assert generate(model, tokenizer, "Question\n") == "Paris."


def test_end_tokens_are_those_of_all_files_and_extra_ones(tmp_path):
    path = write_speaking(tmp_path / "m", "abcdef", endless=True)
    tiny.edit_json(path / "config.json", eos_token_id=[ord("e")])
    tiny.edit_json(path / "generation_config.json", eos_token_id=ord("f"))
    model, tokenizer = load(path)
    assert end_tokens(model, tokenizer, [7]) == {ord("e"), ord("f"), tiny.EOS_ID, 7}
    assert generate(model, tokenizer, PROMPT) == "abcd"
    responses = stream(model, tokenizer, extra_eos_token_ids=[ord("c")])
    assert text_of(responses) == "ab"
    assert responses[-1].finish_reason == "stop"


def test_max_tokens(tmp_path):
    model, tokenizer = speaking(tmp_path, "0123456789", endless=True)
    for count in (1, 2, 25):
        responses = stream(model, tokenizer, max_tokens=count)
        assert len(responses) == count
        assert text_of(responses) == ("0123456789" * 3)[:count]
        assert [r.finish_reason for r in responses] == [None] * (count - 1) + ["length"]
    assert len(list(generate_step(PROMPT, model, max_tokens=3))) == 3


def test_the_context_ends_an_answer(tmp_path):
    path = write_speaking(tmp_path / "m", "0123456789", endless=True)
    model, tokenizer = load(path, max_kv_size=20)
    for limit in (-1, 1000):
        responses = stream(model, tokenizer, max_tokens=limit)
        # 20 positions, and the token that the last one predicts.
        assert len(responses) == 20
        assert responses[-1].finish_reason == "length"
    assert len(stream(model, tokenizer, [1] * 20 + PROMPT[:0])) == 1
    assert len(list(generate_step([1] * 18, model))) == 3
    # So does a pool that is smaller than the context, or shared with others.
    pool = model.make_pool(32)
    other = Sequence(pool)
    assert len(list(generate_step(PROMPT, model, cache=Sequence(model.make_pool(5))))) == 5
    other.append([1] * 20)
    with pytest.raises(ContextLengthError):
        next(generate_step(PROMPT, model, cache=Sequence(pool)))


def test_a_prompt_longer_than_the_context(tmp_path, monkeypatch):
    model, tokenizer = speaking(tmp_path, "ok", config={"max_position_embeddings": 50})
    cache = model.make_cache()
    list(generate_step(PROMPT, model, max_tokens=2, cache=cache))
    held = list(cache.tokens)
    monkeypatch.setattr(decode, "forward", None)  # nothing may be computed
    for run in (
        lambda: next(generate_step([1] * 51, model, cache=cache)),
        lambda: next(stream_generate(model, tokenizer, "x" * 51)),
        lambda: generate(model, tokenizer, [1] * 51),
        lambda: generate_batch(model, tokenizer, ["fine", "x" * 51]),
    ):
        with pytest.raises(ContextLengthError) as error:
            run()
        assert_one_sentence(error.value, "51", "50", "max_kv_size")
    assert cache.tokens == held


@pytest.mark.parametrize("limit", [0, -2])
def test_wrong_arguments(tiny_model, limit):
    model, tokenizer = tiny_model
    with pytest.raises(Q4MetalError) as error:
        generate(model, tokenizer, [1], max_tokens=limit)
    assert_one_sentence(error.value, "max_tokens", str(limit))
    with pytest.raises(Q4MetalError) as error:
        generate(model, tokenizer, "")
    assert_one_sentence(error.value, "no tokens")


@pytest.mark.parametrize(
    ("stop", "expected", "reason"),
    [
        ("User:", "Hi. ", "stop"),
        (["zzz", "User:"], "Hi. ", "stop"),
        (["s", "User:"], "Hi. U", "stop"),
        ("User:!", "Hi. User:", "stop"),  # begun, never complete: shown in the end
        ("H", "", "stop"),
        ((), "Hi. User:", "stop"),
    ],
)
def test_stop_strings_never_leak(tmp_path, stop, expected, reason):
    model, tokenizer = speaking(tmp_path, "Hi. User:")
    responses = stream(model, tokenizer, stop=stop)
    assert text_of(responses) == expected
    assert responses[-1].finish_reason == reason
    shown = ""
    for response in responses:
        shown += response.text
        assert expected.startswith(shown)
    if expected == "Hi. ":
        assert len(responses) == len("Hi. User:")  # it ends with the stop string's last token


def test_a_stop_string_begun_at_max_tokens_is_shown(tmp_path):
    model, tokenizer = speaking(tmp_path, "Hi. User:")
    responses = stream(model, tokenizer, stop="User:", max_tokens=6)
    assert text_of(responses) == "Hi. Us"
    assert responses[-1].finish_reason == "length"


def test_split_characters_are_held_back(tmp_path):
    model, tokenizer = speaking(tmp_path, "a世🙂b")
    responses = stream(model, tokenizer)
    assert [r.text for r in responses] == ["a", "", "", "世", "", "", "", "🙂", "b", ""]
    cut = stream(model, tokenizer, max_tokens=6)
    assert text_of(cut).startswith("a世")
    assert text_of(cut) == tokenizer.decode([r.token for r in cut])


def test_bos_is_not_doubled(tiny_model):
    model, _ = tiny_model
    asked = []

    def encode(text, add_special_tokens):
        asked.append((text, add_special_tokens))
        return [1, 2]

    fake = SimpleNamespace(bos_token="<s>", encode=encode, eos_token_ids=(), detokenizer=lambda: (
        SimpleNamespace(add=lambda token: "", finish=lambda: "")))  # fmt: skip
    for prompt in ("<s>Hello", "Hello <s>"):
        generate(model, fake, prompt, max_tokens=1)
    fake.bos_token = None
    generate(model, fake, "<s>Hello", max_tokens=1)
    assert [special for _, special in asked] == [False, True, True]


@pytest.mark.parametrize("sampling", [SamplingParams(), RANDOM], ids=["greedy", "random"])
def test_a_cache_is_kept_between_turns(tiny_model, sampling):
    model, tokenizer = tiny_model
    cache = model.make_cache()
    first = stream(model, tokenizer, list(range(40)), max_tokens=10, sampling=sampling, cache=cache)
    tokens = [r.token for r in first]
    assert cache.tokens == [*range(40), *tokens[:-1]]
    turn = [*range(40), *tokens, 7, 8, 9]
    second = stream(model, tokenizer, turn, max_tokens=10, sampling=sampling, cache=cache)
    assert (second[0].prompt_tokens, second[0].cached_tokens) == (53, 49)
    alone = stream(model, tokenizer, turn, max_tokens=10, sampling=sampling)
    assert [r.token for r in second] == [r.token for r in alone]
    # Another branch of the conversation: what is common stays.
    branch = [*range(40), 200, 201]
    third = stream(model, tokenizer, branch, max_tokens=10, sampling=sampling, cache=cache)
    assert third[0].cached_tokens == 40
    assert cache.tokens[:42] == branch
    alone = stream(model, tokenizer, branch, max_tokens=10, sampling=sampling)
    assert [r.token for r in third] == [r.token for r in alone]
    # The same again: one token is computed, for its logits.
    again = stream(model, tokenizer, branch, max_tokens=10, sampling=sampling, cache=cache)
    assert again[0].cached_tokens == 41
    assert [r.token for r in again] == [r.token for r in alone]


def test_seeds(tiny_model):
    model, tokenizer = tiny_model
    texts = [generate(model, tokenizer, "abc", 30, sampling=RANDOM) for _ in range(2)]
    assert texts[0] == texts[1]
    other = SamplingParams(temperature=1.5, seed=12)
    assert generate(model, tokenizer, "abc", 30, sampling=other) != texts[0]


def test_the_penalty_sees_prompt_and_answer(tiny_model):
    """Without it the tiny model repeats itself at once; with a huge one no recent token returns."""
    model, tokenizer = tiny_model
    prompt = torch.randint(256, (30,)).tolist()

    def repeats(penalty):
        strong = SamplingParams(repetition_penalty=penalty)
        answer = stream(model, tokenizer, prompt, max_tokens=40, sampling=strong)
        tokens = prompt + [r.token for r in answer]
        return [i for i in range(30, len(tokens)) if tokens[i] in tokens[i - 20 : i]]

    assert repeats(1.0)
    assert not repeats(1e6)


def test_processors_and_samplers_of_one_s_own(tiny_model):
    model, _ = tiny_model
    seen = []

    def ban(tokens, logits):
        seen.append(list(tokens))
        return logits.index_fill(0, torch.tensor([5]), 1e9)

    steps = generate_step([1, 2], model, max_tokens=2, logits_processors=[ban])
    assert [token for token, _ in steps] == [5, 5]
    assert seen == [[1, 2], [1, 2, 5]]
    steps = generate_step([1, 2], model, max_tokens=3, sampler=lambda logprobs: torch.tensor(9))
    assert [token for token, _ in steps] == [9, 9, 9]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("sampling", [SamplingParams(), RANDOM], ids=["greedy", "random"])
def test_a_batch_writes_what_each_prompt_gets_alone(tmp_path, eager, sampling):
    """Eleven prompts of all lengths: more than are decoded together, some ending early."""
    path = tiny.write_tiny(tmp_path / "m", config={"max_position_embeddings": 2048}).path
    model, tokenizer = load(path)
    model.eager = eager
    prompts = [
        torch.randint(256, (n,)).tolist() for n in (1, 9, 300, 31, 32, 33, 2, 60, 600, 5, 64)
    ]
    options = {"max_tokens": 40, "sampling": sampling, "stop": ["\x05", "q"]}
    alone = [generate(model, tokenizer, prompt, **options) for prompt in prompts]
    assert len(set(map(len, alone))) > 3
    assert generate_batch(model, tokenizer, prompts, **options) == alone
    assert generate_batch(model, tokenizer, [], **options) == []
    assert generate_batch(model, tokenizer, iter(["abc"]), 3) == [
        generate(model, tokenizer, "abc", 3)
    ]


def test_a_batch_may_run_into_the_context(tmp_path):
    path = write_speaking(tmp_path / "m", "0123456789", endless=True)
    model, tokenizer = load(path, max_kv_size=40)
    prompts = [[1] * n + PROMPT for n in (0, 10, 38, 39)]
    texts = generate_batch(model, tokenizer, prompts, max_tokens=-1)
    assert [len(text) for text in texts] == [40, 30, 2, 1]


def test_closing_early_keeps_whole_passes(tiny_model):
    model, tokenizer = tiny_model
    cache = model.make_cache()
    responses = stream_generate(model, tokenizer, [1, 2, 3], 50, cache=cache)
    tokens = [next(responses).token for _ in range(4)]
    responses.close()
    assert cache.tokens == [1, 2, 3, *tokens[:-1]]
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("eager", [False, True])
def test_an_interrupt_in_a_pass_leaves_the_tokens_before_it(tiny_model, monkeypatch, eager):
    model, tokenizer = tiny_model
    model.eager = eager
    prompt = list(range(20))
    alone = stream(model, tokenizer, prompt, max_tokens=12)
    calls = []
    append = Sequence.append

    def interrupt(self, tokens):  # the last thing that a pass does
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        append(self, tokens)

    monkeypatch.setattr(Sequence, "append", interrupt)
    cache = model.make_cache()
    seen = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(r.token for r in stream_generate(model, tokenizer, prompt, cache=cache))
    monkeypatch.undo()
    assert not torch.is_inference_mode_enabled()
    tokens = [r.token for r in alone]
    assert seen == tokens[:4]
    assert cache.tokens == [*prompt, *tokens[:3]]
    # The conversation goes on from there.
    turn = [*prompt, *tokens[:4]]
    more = stream(model, tokenizer, turn, max_tokens=8, cache=cache)
    assert more[0].cached_tokens == 23
    assert [r.token for r in more] == tokens[4:]
    model.eager = False


def test_a_model_without_checkpoint_has_the_tokenizer_s_end(tiny_model):
    model, tokenizer = tiny_model
    other = load_model(model.checkpoint.path)
    other.checkpoint = None
    assert end_tokens(other, tokenizer) == {tiny.EOS_ID}
