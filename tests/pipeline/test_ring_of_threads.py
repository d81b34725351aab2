"""The pipeline's own code against one process, with threads for ranks: every token, every bit."""

import gc
import itertools

import pytest
import tiny
import torch
from ring import threads_ring

from torch_q4metal.cache import Sequence
from torch_q4metal.errors import ContextLengthError, PipelineError
from torch_q4metal.generation import decode_together, generate_step
from torch_q4metal.models import load_model
from torch_q4metal.pipeline.message import Message
from torch_q4metal.sampling import SamplingParams, make_sampler
from torch_q4metal.text import Text

CONTEXT = {"config": {"max_position_embeddings": 2048}}
DENSE = {"model.layers.3.mlp.up_proj": False}
# What can differ, in pairs: (checkpoint, ranges of the ranks, options of load_model).
CASES = {
    "llama, tied, even": ({"family": "llama"}, [2, 2], {}),
    "qwen2, untied, uneven": ({"family": "qwen2", "tied": False}, [1, 3], {}),
    "three ranks, exact": ({"family": "llama", "tied": False}, [1, 2, 1], {"precision": "exact"}),
    "four ranks, qwen2, tied": ({"family": "qwen2"}, [1, 1, 1, 1], {}),
    "int8": ({"family": "llama", "dtype": torch.bfloat16}, [3, 1], {"precision": "int8"}),
    "a dense layer on the last rank": ({"family": "llama", "overrides": DENSE}, [2, 2], {}),
    "modules": ({"family": "qwen2"}, [2, 2], {"eager": True}),
    "bfloat16 activations": ({"family": "llama"}, [1, 3], {"dtype": torch.bfloat16}),
}


def ranges_of(counts):
    bounds = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return [range(*pair) for pair in itertools.pairwise(bounds)]


def random_prompt(length, seed=0):
    generator = torch.Generator().manual_seed(seed + length)
    return torch.randint(256, (length,), generator=generator).tolist()


@pytest.fixture
def pair(tmp_path):
    """A function that gives (model of one process, ring of that model) for a split."""

    def make(counts=(2, 2), family="llama", options=None, **checkpoint):
        layers = sum(counts)
        path = tiny.write_tiny(tmp_path / "m", family, layers=layers, **CONTEXT, **checkpoint).path
        options = dict(options or {})
        eager = options.get("eager", False)
        whole = load_model(path, **{k: v for k, v in options.items() if k != "eager"})
        whole.eager = eager
        return whole, threads_ring(path, ranges_of(counts), **options)

    return make


@pytest.mark.parametrize("name", CASES)
def test_logits_have_the_bits_of_one_process(pair, name):
    """Prompts of one pass, of a chunk, and of several chunks, each followed by some tokens."""
    checkpoint, counts, options = CASES[name]
    whole, ring = pair(counts, options=options, **checkpoint)
    with ring as staged:
        for length in (5, 200, 1100):
            prompt = random_prompt(length)
            expected = list(generate_step(list(prompt), whole, max_tokens=4))
            actual = list(generate_step(list(prompt), staged, max_tokens=4))
            assert [token for token, _ in actual] == [token for token, _ in expected]
            for (_, ours), (_, theirs) in zip(actual, expected, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("counts", [(2, 2), (1, 2, 1)])
def test_a_batch_gives_each_text_its_own_tokens(pair, counts):
    """Groups take turns in the stages; texts end at different times and others come in."""
    whole, ring = pair(counts, family="qwen2", tied=False)
    prompts = [random_prompt(n, seed=n) for n in (3, 60, 700, 9, 33, 5, 12, 100, 2, 40, 8)]
    ends = [3, 8, 5, 1, 12, 7, 2, 9, 4, 6, 10]
    sampling = SamplingParams(temperature=1.0, top_k=50, seed=7, repetition_penalty=1.3)

    def run(model):
        texts = [[] for _ in prompts]

        def take(index, token, last):
            texts[index].append(token)
            return len(texts[index]) == ends[index]

        copies = [list(prompt) for prompt in prompts]
        decode_together(model, copies, 12, take, sampling=sampling)
        return texts

    with ring as staged:
        assert run(staged) == run(whole)


@pytest.mark.parametrize(("texts", "passes"), [(1, 1), (4, 5)])
def test_tokens_are_looked_ahead_to(pair, monkeypatch, texts, passes):
    """Ranks 1 and 2 read only prompts, and the first pass that two texts have together."""
    whole, ring = pair((1, 2, 1))
    prompts = [random_prompt(n) for n in (40, 45, 37, 42)][:texts]
    read = []

    def run(model):
        found = [[] for _ in prompts]

        def take(index, token, last):
            found[index].append(token)
            return False

        decode_together(model, [list(prompt) for prompt in prompts], 18, take)
        return found

    with ring as staged:
        read_pass = Message.read_pass
        monkeypatch.setattr(Message, "read_pass", lambda m: (read.append(m), read_pass(m))[1])
        assert run(staged) == run(whole)
        assert len(read) == 2 * passes


def test_samplers_of_the_caller_stay_with_it(pair):
    """Callables cannot travel: the logits come back. Numbers stay the same."""
    whole, ring = pair()
    seen = []

    def process(tokens, logits):
        seen.append(len(tokens))
        return logits * 0.9

    with ring as staged:
        texts = [
            [
                token
                for token, _ in generate_step(
                    random_prompt(20), model, max_tokens=8, logits_processors=[process],
                    sampler=make_sampler(0.8, seed=3),
                )
            ]
            for model in (whole, staged)
        ]  # fmt: skip
    assert texts[0] == texts[1]
    assert seen == [*range(20, 28)] * 2


@pytest.mark.parametrize("counts", [(2, 2), (1, 1, 2)])
def test_texts_are_cut_back_shared_and_freed(pair, counts):
    """What a chat does to its cache, and what drafts and shared prefixes would."""
    whole, ring = pair(counts)

    def run(model):
        pool = model.make_pool(4096)
        first = Sequence(pool)
        found = []

        def go_on(tokens, cache):
            steps = list(generate_step(tokens, model, max_tokens=5, cache=cache))
            found.extend(logprobs for _, logprobs in steps)

        prompt = random_prompt(70)
        go_on(list(prompt), first)
        other = first.fork()  # shares blocks, the last of them only in part
        go_on(prompt[:50] + random_prompt(30), first)
        go_on(prompt + random_prompt(9), other)
        third = other.fork()
        first.free()
        go_on(random_prompt(300, seed=5), first)  # in blocks that were others'
        del other
        gc.collect()
        go_on(prompt + random_prompt(12), third)
        go_on(random_prompt(40, seed=9), Sequence(pool))
        # A text goes on where another one has been in its cache meanwhile, in other blocks.
        held = generate_step(list(prompt), model, cache=third)
        found.extend(next(held)[1] for _ in range(2))
        third.truncate(60)
        taken = Sequence(pool)
        taken.reserve(1)
        between = generate_step(prompt[:60] + random_prompt(11), model, cache=third)
        found.extend(next(steps)[1] for steps in (between, held))
        return torch.stack(found)

    with ring as staged:
        assert torch.equal(run(staged), run(whole))


def test_an_interrupt_leaves_a_cache_that_goes_on(pair):
    """Ctrl-C in rank 0's own layers: the chunk is nowhere counted, chunks before it stay."""
    whole, ring = pair(options={"eager": True})
    prompt = random_prompt(1300)
    with ring as staged:
        cache = staged.make_cache()
        passes = []

        def interrupt(_module, _inputs):
            passes.append(None)
            if len(passes) == 3:
                raise KeyboardInterrupt

        hook = staged.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(generate_step(list(prompt), staged, cache=cache))
        hook.remove()
        assert cache.tokens == prompt[:1024]
        actual = [logprobs for _, logprobs in generate_step(prompt, staged, max_tokens=3)]
        expected = [logprobs for _, logprobs in generate_step(prompt, whole, max_tokens=3)]
        assert torch.equal(torch.stack(actual), torch.stack(expected))


def test_an_answer_that_is_given_up_disturbs_no_other(pair):
    whole, ring = pair()
    with ring as staged:
        engine = staged.engine
        for i in range(9):  # more than results may be under way
            tokens = random_prompt(20, seed=i)
            engine.submit([Text(tokens, staged.make_cache(64), SamplingParams(), logprobs=False)])
        actual = [token for token, _ in generate_step(random_prompt(30), staged, max_tokens=6)]
        expected = [token for token, _ in generate_step(random_prompt(30), whole, max_tokens=6)]
    assert actual == expected


def test_a_full_context_is_told_before_anything_is_sent(pair):
    _, ring = pair()
    with ring as staged:
        cache = staged.make_cache(32)
        text = Text(random_prompt(33), cache, SamplingParams())
        with pytest.raises(ContextLengthError):
            staged.engine.submit([text])
        assert cache.length == 0
        staged.max_kv_size = 16
        with pytest.raises(ContextLengthError, match="longer than the context of 16"):
            staged.engine.submit([Text(random_prompt(17), staged.make_cache(64), SamplingParams())])


def test_a_stage_that_fails_is_named(pair, monkeypatch):
    _, ring = pair((1, 2, 1))
    with ring as staged:
        broken = staged.ring.workers[0]
        monkeypatch.setattr(broken._cache, "follow", lambda work: 1 / 0)
        with pytest.raises(PipelineError, match=r"rank 1 on .* failed: ZeroDivisionError"):
            next(generate_step(random_prompt(5), staged))


def test_a_stage_alone_says_what_to_call(pair):
    _, ring = pair()
    with ring as staged, pytest.raises(PipelineError, match="layers 0 to 1 of 4 only"):
        staged(torch.tensor([[1, 2, 3]]))


def test_a_decoded_token_takes_a_small_message(pair):
    """One message a hop: the residual row, and a header that does not grow with the context."""
    _, ring = pair()
    with ring as staged:
        sent = staged.ring.transports[0].sent
        steps = generate_step(random_prompt(900), staged, max_tokens=40, logprobs=False)
        next(steps)
        del sent[:]
        count = sum(1 for _ in steps)
        assert len(sent) == count == 39
        assert max(sent) < 4 * staged.config.hidden_size + 256
