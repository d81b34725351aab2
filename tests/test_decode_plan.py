"""A pass of the decode plan for tokens against the modules that it stands for."""

import pytest
import torch
from plan_models import BOUND, KV_BOUND, MODELS, PRECISIONS, difference, keys_values, load

from torch_q4metal import decode, ops
from torch_q4metal.errors import ContextLengthError
from torch_q4metal.models.loading import FAMILIES

# Last and first of a block of 32, and of a split of 512.
BOUNDARIES = (31, 32, 33, 63, 64, 511, 512, 513)


def assert_pass_equals(model, plan, precision, ids, eager, planned):
    """One pass of the plan for ids [B][L], against the modules sequence by sequence."""
    starts = [sequence.length for sequence in eager]
    actual = plan.forward(ids, planned)
    for i, tokens in enumerate(ids):
        expected = model(torch.tensor([tokens]), [eager[i]])[0, -1]
        assert difference(actual[i], expected) < BOUND[precision]
        place = starts[i], starts[i] + len(tokens)
        own, theirs = keys_values(planned[i], *place), keys_values(eager[i], *place)
        assert difference(own, theirs) < KV_BOUND[precision]
        assert planned[i].tokens == eager[i].tokens


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_equal_the_modules(tmp_path, name, precision):
    model = load(tmp_path, precision, **MODELS[name])
    plan = decode.DecodePlan(model)
    ids = torch.randint(model.config.vocab_size, (520,)).tolist()
    eager, planned = model.make_cache(520), model.make_cache(520)
    for cache in (eager, planned):
        model(torch.tensor([ids[:513]]), [cache])
    singles = [(position, 1) for position in (0, *BOUNDARIES)]
    drafts = [(29, 4), (57, 8), (508, 7)]  # over the boundaries, from the plan's own keys
    for start, count in sorted(singles + drafts, reverse=True):
        eager.truncate(start), planned.truncate(start)
        assert_pass_equals(model, plan, precision, [ids[start : start + count]], [eager], [planned])


def test_every_family_is_compared():
    assert set(FAMILIES) == {options.get("family", "llama") for options in MODELS.values()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["every format", "qwen2, every format"])
@torch.inference_mode()
def test_ragged_rows_equal_the_modules(tmp_path, name, precision):
    """Texts of different lengths, in several slabs, each with one or more tokens of a pass."""
    model = load(tmp_path, precision, **MODELS[name])
    plan = decode.DecodePlan(model)
    pools = [model.make_pool(9 * 576) for _ in range(2)]
    eager, planned = [[decode.Sequence(pool) for _ in BOUNDARIES] for pool in pools]
    others = [decode.Sequence(pool) for pool in pools]
    for other in others:
        other.reserve(640)  # so that the last texts lie in two slabs
    texts = torch.randint(model.config.vocab_size, (len(BOUNDARIES), 600)).tolist()
    for text, length, *caches in zip(texts, BOUNDARIES, eager, planned, strict=True):
        for cache in caches:
            model(torch.tensor([text[:length]]), [cache])
    assert len(pools[1].slabs) > 1

    for rows in range(1, 9):  # one token each; the first texts come along every time
        chosen = list(range(rows))
        ids = [[texts[i][eager[i].length]] for i in chosen]
        assert_pass_equals(model, plan, precision, ids, eager[:rows], planned[:rows])
    for chosen, counts in (
        ((7, 0, 4), (3, 1, 4)), ((5, 6), (5, 2)), ((3, 2, 1, 0), (1, 2, 1, 3)), ((6,), (8,)),
    ):  # fmt: skip
        ids = [texts[i][eager[i].length :][:count] for i, count in zip(chosen, counts, strict=True)]
        assert_pass_equals(
            model, plan, precision, ids, [eager[i] for i in chosen], [planned[i] for i in chosen]
        )


@torch.inference_mode()
def test_long_contexts_are_split_and_joined(tmp_path):
    model = load(tmp_path)
    plan = decode.DecodePlan(model)
    ids = torch.randint(model.config.vocab_size, (1300,)).tolist()
    eager, planned = model.make_cache(1300), model.make_cache(1300)
    for cache in (eager, planned):
        model(torch.tensor([ids]), [cache])
    for length in (1290, 1025, 1024, 1023):
        eager.truncate(length), planned.truncate(length)
        assert_pass_equals(model, plan, "exact", [ids[length : length + 1]], [eager], [planned])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_threads_and_batches_give_the_same_bits(tmp_path, precision):
    model = load(tmp_path, precision)
    plan = decode.DecodePlan(model)
    texts = [torch.randint(model.config.vocab_size, (n,)) for n in (40, 3, 64, 31, 1, 33, 20, 7)]

    def run(threads, together):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        pool = model.make_pool(2048)
        try:
            with torch.inference_mode():
                caches = [decode.Sequence(pool) for _ in texts]
                for text, cache in zip(texts, caches, strict=True):
                    model(text[None], [cache])
                steps = []
                for step in range(3):
                    ids = [[(7 * step + i) % 250] for i in range(8)]
                    if together:
                        steps.append(plan.forward(ids, caches))
                    else:
                        rows = [plan.forward([i], [c]) for i, c in zip(ids, caches, strict=True)]
                        steps.append(torch.cat(rows))
            return torch.stack(steps)
        finally:
            torch.set_num_threads(before)

    expected = run(1, together=False)
    for threads in (1, 2, 3, 5):
        assert torch.equal(run(threads, together=True), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.inference_mode()
def test_drafts_have_the_bits_of_one_token_after_the_other(tmp_path, precision):
    model = load(tmp_path, precision, **MODELS["qwen2, every format"])
    plan = decode.DecodePlan(model)
    ids = torch.randint(model.config.vocab_size, (520,)).tolist()
    single, drafted = model.make_cache(520), model.make_cache(520)
    for cache in (single, drafted):
        model(torch.tensor([ids[:508]]), [cache])
    expected = [plan.forward([[token]], [single]) for token in ids[508:516]]
    for count in range(1, 9):
        drafted.truncate(508)
        actual = plan.forward([ids[508 : 508 + count]], [drafted])
        assert torch.equal(actual, expected[count - 1])
    assert torch.equal(keys_values(drafted, 508, 516), keys_values(single, 508, 516))


def test_greedy_ids_and_logits_of_the_op_agree(tmp_path):
    model = load(tmp_path)
    plan = decode.DecodePlan(model)
    cache = model.make_cache(64)
    cache.reserve(2)
    rope = torch.stack(model.config.rope.rows(0, 2, 2), 1)
    table = torch.tensor([cache.block_table] * 2, dtype=torch.int32)
    logits, tokens = torch.empty(2, model.config.vocab_size), torch.empty(2, dtype=torch.int64)
    arguments = (torch.tensor([5, 6]), torch.tensor([0, 1]), rope, table)
    for out in (logits, tokens):
        ops.decode_step(plan.native.handle, *arguments, cache.pool.slabs, out)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.library.opcheck(
        torch.ops.q4metal.decode_step.default,
        (plan.native.handle, *arguments, None, cache.pool.slabs, logits),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_likeliest_tokens_are_those_of_the_logits(tmp_path, threads):
    """By rows and threads; of equally likely ones the first."""
    model = load(tmp_path)
    plan = decode.DecodePlan(model)
    pool = model.make_pool(512)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for ids in ([[5]], [[5, 6, 7]], [[5], [6, 7], [8, 9, 1, 2]]):
            texts = [decode.Sequence(pool) for _ in ids]
            expected = plan.forward(ids, texts).argmax(-1).tolist()
            assert plan.likeliest(ids, [decode.Sequence(pool) for _ in ids]) == expected
        model.model.norm.weight.data.zero_()
        assert decode.DecodePlan(model).likeliest([[5], [6]], texts[:2]) == [0, 0]
    finally:
        torch.set_num_threads(before)


def test_errors_name_the_value(tmp_path):
    model = load(tmp_path)
    plan = decode.DecodePlan(model)
    handle, cache = plan.native.handle, model.make_cache(64)
    cache.reserve(1)
    good = {
        "input": torch.tensor([5]),
        "positions": torch.tensor([0]),
        "rope": torch.stack(model.config.rope.rows(0, 1, 1), 1),
        "block_tables": torch.tensor([cache.block_table], dtype=torch.int32),
        "kv": cache.pool.slabs,
        "out": torch.empty(1, model.config.vocab_size),
    }
    for change, error, sentence in [
        ({"input": torch.tensor([9999])}, IndexError, "input holds 9999"),
        ({"input": torch.tensor([5] * 513)}, ValueError, "takes 1 to 512 token ids"),
        ({"input": torch.tensor([5], dtype=torch.int32)}, ValueError, "input is Int"),
        ({"positions": torch.tensor([-1])}, ValueError, "positions holds -1"),
        ({"positions": torch.tensor([10**6])}, ValueError, "positions holds 1000000"),
        ({"positions": torch.tensor([40])}, ValueError, "position 40 needs 2 blocks"),
        (
            {"block_tables": torch.tensor([[77]], dtype=torch.int32)},
            IndexError,
            "block_tables holds 77",
        ),
        ({"kv": []}, ValueError, "kv is empty"),
        ({"kv": [cache.pool.slabs[0].half()]}, ValueError, "kv is Half"),
        ({"out": torch.empty(1, 3)}, ValueError, "out is Float"),
        ({"rope": torch.empty(1, 2, 4)}, ValueError, "rope is Float"),
    ]:
        with pytest.raises(error, match=sentence):
            ops.decode_step(handle, **good | change)
    ops.decode_step(handle, **good)
    del plan
    with pytest.raises(ValueError, match=f"decode plan {handle} does not exist"):
        ops.decode_step(handle, **good)
    other = decode.DecodePlan(model)
    assert other.native.handle != handle


def test_a_full_cache_is_named_before_anything_is_computed(tmp_path):
    model = load(tmp_path)
    plan = decode.DecodePlan(model)
    cache = model.make_cache(32)
    with torch.inference_mode():
        model(torch.randint(250, (1, 32)), [cache])
    with pytest.raises(ContextLengthError):
        plan.forward([[1]], [cache])
    assert cache.length == 32


def test_generation_uses_the_plan_and_eager_does_not(tmp_path):
    from torch_q4metal.generation import generate_step

    model = load(tmp_path)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    texts = {}
    for eager in (False, True):
        model.eager = eager
        assert (decode.plan_of(model) is None) == eager
        texts[eager] = [token for token, _ in generate_step(prompt, model, max_tokens=40)]
    assert texts[False] == texts[True]
