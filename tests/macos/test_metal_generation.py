"""Text from a model on MPS: load_model(device="mps") and generate, against the CPU.

The stand-in works late: what is queued is done when somebody waits, so that a token which is looked
at too early, or memory that is used again too early, shows.
"""

import gc
import itertools
from dataclasses import replace

import pytest
import speaking
import tiny
import torch
from sentence import assert_one_sentence

from torch_q4metal import decode, device_sampling, generation
from torch_q4metal.builtin_model import builtin_model
from torch_q4metal.engine import engine_of
from torch_q4metal.errors import ContextLengthError, Q4MetalError
from torch_q4metal.generation import (
    decode_together,
    generate,
    generate_step,
    stream_generate,
)
from torch_q4metal.models import base, load_model
from torch_q4metal.sampling import SamplingParams
from torch_q4metal.text import Text
from torch_q4metal.tokenizer import Tokenizer

BOUND = 2e-5  # of logits, relative to the largest: float32 in both, summed in another order


@pytest.fixture
def late(mac):
    with mac.working_late():
        yield mac
        gc.collect()


def on_both(path, **options):
    return [load_model(path, torch.float32, device, **options) for device in ("cpu", "mps")]


def tiny_on_both(path, *, family="llama", max_kv_size=None, **options):
    return on_both(tiny.write_tiny(path, family, **options).path, max_kv_size=max_kv_size)


def prompt_of(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (length,), generator=generator).tolist()


def ids_of(model, prompt, count, **options):
    options = {"logprobs": False} | options
    return [token for token, _ in generate_step(prompt, model, max_tokens=count, **options)]


def keys_and_values(cache):
    """[2, layers, kv_heads, length, head_dim] of what the cache counts."""
    blocks = cache.pool.slabs[0].cpu()[:, :, cache.block_table]
    return blocks.transpose(2, 3).flatten(3, 4)[:, :, :, : cache.length]


def assert_close(actual, expected, bound=BOUND):
    assert actual.shape == expected.shape
    assert ((actual.cpu() - expected).abs().max() / expected.abs().max()).item() < bound


class Silent:
    """A tokenizer of a model whose text nobody reads."""

    eos_token_ids = ()

    def detokenizer(self):
        return self

    def add(self, token):
        return ""

    def finish(self):
        return ""


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_modules_read_prompts(tmp_path, mac, monkeypatch, family):
    """In chunks, of several texts."""
    monkeypatch.setattr(base, "PREFILL_CHUNK", 16)
    ids = torch.randint(tiny.VOCAB_SIZE, (2, 37))
    results = []
    for model in tiny_on_both(
        tmp_path / "model", family=family, overrides={"lm_head": False}, tied=False
    ):
        caches = [model.make_cache(64), model.make_cache(64)]
        model(ids[:, :5], caches)
        logits = model(ids[:, 5:], caches, logits_to_keep=3)
        results.append((logits, *map(keys_and_values, caches)))
        assert [cache.tokens for cache in caches] == ids.tolist()
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)


def test_smollm2_writes_the_same_text(mac):
    """16 greedy tokens, all in float32, from weights that came once and lie in one buffer."""
    path = builtin_model()
    prompt = Tokenizer.from_dir(path).encode("The capital of France is")
    models = on_both(path)
    expected, actual = (ids_of(model, prompt, 16) for model in models)
    assert actual == expected
    assert len(set(expected)) > 4
    passes, dispatches, _ = mac.plan_statistics()
    ids_of(models[1], prompt[:1], 2)
    assert mac.plan_statistics()[:2] == (passes + 2, dispatches + 2 * (5 * 30 + 3))
    before = mac.uploaded_bytes(), mac.allocated_bytes()
    model = load_model(path, device="mps")
    assert mac.uploaded_bytes() - before[0] == model.checkpoint.weight_bytes
    assert mac.allocated_bytes() - before[1] < 1.001 * model.checkpoint.weight_bytes
    assert len({t.untyped_storage().data_ptr() for t in model.parameters()}) == 1


@pytest.mark.parametrize("length", [1, 7, 45])  # the last is read by modules
def test_greedy_text_and_cache_are_those_of_the_cpu(tmp_path, late, length):
    (text, cache), (own, own_cache) = [
        (ids_of(model, prompt_of(length), 70, cache=cache), cache)
        for model in tiny_on_both(tmp_path / "model", attention_bias=True)
        for cache in [model.make_cache()]
    ]
    assert own == text
    assert own_cache.tokens == cache.tokens == prompt_of(length) + text[:-1]
    assert_close(keys_and_values(own_cache), keys_and_values(cache))


def test_a_token_costs_one_submission_and_nothing_else(tmp_path, late):
    """5 L + 3 dispatches; nothing is allocated, waited for or done by other operators."""
    _, model = tiny_on_both(tmp_path / "model", layers=3)
    steps = generate_step(prompt_of(33), model, max_tokens=-1, logprobs=False)
    for _ in range(3):
        next(steps)

    def counts():
        return (
            *late.plan_statistics()[:2], late.allocations(), late.waits(), len(late.fallbacks())
        )  # fmt: skip

    before = counts()
    for _ in range(40):  # past the end of what was uploaded at once, and of a block
        next(steps)
    submissions, dispatches, *others = (a - b for a, b in zip(counts(), before))
    assert (submissions, dispatches) == (40, 40 * (5 * 3 + 3))
    assert others == [0, 0, 0]


def batch_on(model, prompts, count, sampling=None, watch=lambda: None, ends=None):
    """Tokens of each prompt; ``watch`` is called for each token; ``ends``: when texts stop."""
    texts = [[] for _ in prompts]

    def take(index, token, last):
        watch()
        texts[index].append(token)
        return ends is not None and len(texts[index]) == ends[index]

    decode_together(model, [list(p) for p in prompts], count, take, sampling=sampling)
    return texts


def test_sampled_tokens_beyond_1024_positions(tmp_path, late):
    """6 L + 3 dispatches; nothing is allocated or waited for."""
    config = {"max_position_embeddings": 2048}
    _, model = tiny_on_both(tmp_path / "model", config=config)
    seen = []

    def watch():
        seen.append((late.plan_statistics()[1], late.allocations(), late.waits()))

    batch_on(model, [prompt_of(1030)], 8, SamplingParams(temperature=1.0, top_p=0.9), watch)
    for (one, *rest), (other, *rest_then) in itertools.pairwise(seen[1:-1]):
        assert other - one == 6 * 2 + 3
        assert rest == rest_then


SAMPLINGS = {
    "nucleus": SamplingParams(temperature=1.3, top_p=0.95, seed=5),
    "all filters": SamplingParams(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, seed=2**62),
    "nothing else": SamplingParams(temperature=1.5, seed=0),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_sampled_text_is_that_of_the_kernel_in_pytorch(tmp_path, late, name):
    """On the device; on the host, where log-probabilities are wanted; and from the CPU's logits."""
    on_cpu, on_mps = tiny_on_both(tmp_path / "model")
    sampling, prompt = SAMPLINGS[name], prompt_of(9)
    (text,) = batch_on(on_mps, [prompt], 30, sampling)
    tokens = list(prompt)
    for token in text:
        logprobs = on_cpu(torch.tensor([tokens]))[0, -1].log_softmax(-1)
        assert device_sampling.draw(logprobs, sampling, sampling.seed, len(tokens) - 1) == token
        tokens.append(token)
    responses = stream_generate(on_mps, Silent(), prompt, 30, sampling=sampling)
    assert [response.token for response in responses] == text
    (other,) = batch_on(on_mps, [prompt], 30, replace(sampling, seed=6))
    assert other != text
    assert len(set(text)) > 4


def test_without_a_seed_every_text_is_new(tmp_path, late):
    _, model = tiny_on_both(tmp_path / "model")
    sampling = SamplingParams(temperature=1.0)
    one, other = (batch_on(model, [prompt_of(3)], 12, sampling) for _ in range(2))
    assert one != other


def test_penalties_are_those_of_the_cpu(tmp_path, late):
    sampling = SamplingParams(repetition_penalty=1.3)
    texts = [
        batch_on(model, [prompt_of(12)], 24, sampling) for model in tiny_on_both(tmp_path / "model")
    ]
    assert texts[0] == texts[1]


def test_a_token_that_the_host_draws_is_waited_for_once(tmp_path, late):
    _, model = tiny_on_both(tmp_path / "model")
    waits = []
    sampling = SamplingParams(repetition_penalty=1.3)
    batch_on(model, [prompt_of(12)], 6, sampling, lambda: waits.append(late.waits()))
    assert [after - before for before, after in itertools.pairwise(waits)] == [1] * 5


@pytest.mark.parametrize("sampling", [None, SAMPLINGS["nucleus"]])
def test_a_batch_writes_what_each_prompt_gets_alone(tmp_path, late, monkeypatch, sampling):
    """Five texts of different lengths, three at a time: they begin and end at different tokens."""
    monkeypatch.setattr(generation, "MATVEC_ROWS", 3)
    on_cpu, on_mps = tiny_on_both(tmp_path / "model")
    prompts = [prompt_of(length, seed=length) for length in (1, 40, 3, 31, 9)]
    ends = [12, 5, 9, 1, 12]
    together = batch_on(on_mps, prompts, 12, sampling, ends=ends)
    assert [len(text) for text in together] == ends
    for prompt, text in zip(prompts, together, strict=True):
        assert batch_on(on_mps, [prompt], 12, sampling)[0][: len(text)] == text
    if sampling is None:
        assert together == batch_on(on_cpu, prompts, 12, ends=ends)


@pytest.mark.parametrize("tokens", [1, 2, 3, 34])
def test_a_generator_that_is_closed_leaves_whole_passes(tmp_path, late, tokens):
    """The pass that was under way is not counted, and what follows is what would have been."""
    on_cpu, on_mps = tiny_on_both(tmp_path / "model")
    prompt, more = prompt_of(33), prompt_of(5, seed=9)
    results = []
    for model in (on_cpu, on_mps):
        cache = model.make_cache()
        steps = generate_step(prompt, model, max_tokens=-1, cache=cache, logprobs=False)
        text = [next(steps)[0] for _ in range(tokens)]
        steps.close()
        assert cache.tokens == prompt + text[:-1]
        held = keys_and_values(cache)
        fork = cache.fork()
        answers = [ids_of(model, prompt + text + more, 9, cache=c) for c in (cache, fork)]
        assert answers[0] == answers[1]
        results.append((text, answers[0], held))
    assert results[0][:2] == results[1][:2]
    assert_close(results[1][2], results[0][2])


def test_an_early_stop_discards_one_pass(tmp_path, late):
    path = speaking.write_speaking(tmp_path / "model", "Paris.")
    model, tokenizer = load_model(path, device="mps"), Tokenizer.from_dir(path)
    decode.plan_of(model)  # which checks the kernels
    before = late.plan_statistics()[0]
    assert generate(model, tokenizer, [speaking.FIRST], 100) == "Paris."
    assert late.plan_statistics()[0] - before == len("Paris.") + 1 + 1  # an end token, one in vain
    before = late.plan_statistics()[0]
    assert generate(model, tokenizer, [speaking.FIRST], 3) == "Par"
    assert late.plan_statistics()[0] - before == 3


def test_a_fork_between_two_tokens(tmp_path, late):
    """The pass under way writes to a block that is shared from now on."""
    _, model = tiny_on_both(tmp_path / "model")
    prompt = prompt_of(10)
    expected = ids_of(model, prompt, 20)
    cache = model.make_cache()
    cache.pool.max_blocks += 8
    steps = generate_step(prompt, model, max_tokens=20, cache=cache, logprobs=False)
    text = [next(steps)[0] for _ in range(5)]
    fork = cache.fork()
    text += [next(steps)[0] for _ in range(2)]  # this one leaves the block to the fork
    other = ids_of(model, [*fork.tokens, 7], 9, cache=fork)
    assert text + [token for token, _ in steps] == expected
    assert other == ids_of(model, prompt + text[:4] + [7], 9)


def test_a_token_other_than_the_drawn_one(tmp_path, late):
    """The pass that was under way is not the one that is wanted."""
    _, model = tiny_on_both(tmp_path / "model")
    engine, prompt = engine_of(model), prompt_of(10)
    text = Text(list(prompt), model.make_cache(), SamplingParams(), logprobs=False)
    engine.submit([text])
    token, _ = engine.draw(text)
    text.tokens.append((token + 1) % 256)
    engine.submit([text])
    assert [engine.draw(text)[0]] == ids_of(model, text.tokens, 1)


def test_the_end_of_the_context(tmp_path, late):
    texts, caches = [], []
    for model in tiny_on_both(tmp_path / "model", max_kv_size=50):
        caches.append(model.make_cache())
        texts.append(ids_of(model, prompt_of(40), -1, cache=caches[-1]))
        with pytest.raises(ContextLengthError):
            ids_of(model, prompt_of(51), 3)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 11
    assert [cache.length for cache in caches] == [50, 50]


def test_dynamic_rope(tmp_path, late):
    """Angles depend on the length of the text, beyond what the model was trained for."""
    config = {
        "max_position_embeddings": 24,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    models = tiny_on_both(tmp_path / "model", config=config, max_kv_size=128)
    texts = [ids_of(model, prompt_of(20), 40) for model in models]
    assert texts[0] == texts[1]


def test_modules_decode_where_they_are_asked_to(tmp_path, late):
    models = tiny_on_both(tmp_path / "model")
    models[1].eager = True
    before = late.plan_statistics()
    texts = [ids_of(model, prompt_of(20), 6) for model in models]
    assert texts[0] == texts[1]
    assert late.plan_statistics() == before


@pytest.mark.parametrize("sampling", [None, SAMPLINGS["all filters"]])
def test_logits_that_are_nan_are_named(tmp_path, late, sampling):
    _, model = tiny_on_both(tmp_path / "model")
    model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(Q4MetalError, match="of 260 logits that are NaN") as error:
        batch_on(model, [prompt_of(3)], 5, sampling)
    assert_one_sentence(error.value, "device='cpu'")


def test_a_token_that_never_came_is_noticed(tmp_path, late, monkeypatch):
    _, model = tiny_on_both(tmp_path / "model")
    monkeypatch.setattr(torch._C, "_mps_synchronizeEvent", lambda number: None)
    with pytest.raises(RuntimeError, match="did not finish"):
        ids_of(model, prompt_of(3), 5)
