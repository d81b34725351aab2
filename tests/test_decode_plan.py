"""The decode plan against the modules that it stands for, and its barriers against its hazards."""

import itertools
import re
import signal

import pytest
import tiny
import torch

from torch_q4metal import decode, ops
from torch_q4metal.errors import ContextLengthError
from torch_q4metal.models import load_model
from torch_q4metal.models.loading import FAMILIES

BY_BITS = [(bits, group_size) for bits in (2, 3, 4, 5, 6, 8) for group_size in (32, 64, 128)]
BY_GROUP_SIZE = sorted(BY_BITS, key=lambda format: format[1])
BY_NEITHER = [BY_BITS[7 * i % 18] for i in range(18)]


def every_format(formats, tied=False):
    """Overrides that give the matrices of three layers these formats in turn.

    So q, k and v of a layer have bits or group size in common, or neither.
    """
    matrices = [f"self_attn.{name}_proj" for name in "qkvo"]
    matrices += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.{matrix}" for layer in range(3) for matrix in matrices]
    names += ["model.embed_tokens"] + ([] if tied else ["lm_head"])
    return {
        name: {"bits": bits, "group_size": group_size}
        for name, (bits, group_size) in zip(names, itertools.cycle(formats))
    }


WIDE = {"hidden_size": 128, "intermediate_size": 256, "layers": 3}  # every group size divides K
DENSE_LEFTOVERS = {
    "model.layers.0.self_attn.k_proj": False,
    "model.layers.0.mlp.down_proj": False,
    "model.layers.1.self_attn.o_proj": False,
    "model.layers.1.mlp.up_proj": False,
}
MODELS = {
    "tied": {},
    "untied": {"tied": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "biases of dense matrices": {
        "attention_bias": True,
        "mlp_bias": True,
        "dtype": torch.float16,
        "overrides": DENSE_LEFTOVERS,
    },
    "qwen2": {"family": "qwen2", "tied": False},
    "every format": {**WIDE, "tied": False, "overrides": every_format(BY_NEITHER)},
    "every format, tied": {
        **WIDE,
        "dtype": torch.float16,
        "overrides": every_format(BY_BITS, tied=True),
    },
    "qwen2, every format": {
        **WIDE,
        "family": "qwen2",
        "tied": False,
        "dtype": torch.bfloat16,
        "overrides": every_format(BY_GROUP_SIZE),
    },
    "qwen2, tied, dense leftovers": {
        "family": "qwen2",
        "dtype": torch.bfloat16,
        "overrides": DENSE_LEFTOVERS,
    },
    "dense head": {"tied": False, "overrides": {"lm_head": False, "model.embed_tokens": False}},
    "dense tied table": {"dtype": torch.float16, "overrides": {"model.embed_tokens": False}},
    "odd heads": {"heads": 3, "kv_heads": 1, "head_dim": 36, "hidden_size": 96},
    "many small heads": {"heads": 8, "kv_heads": 1, "head_dim": 12, "hidden_size": 96},
    "no sharing": {"heads": 4, "kv_heads": 4, "head_dim": 24},
    "bfloat16": {"dtype": torch.bfloat16, "bits": 2, "group_size": 64, "intermediate_size": 128},
    "llama3 rope": {
        "config": {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        }
    },
}
PRECISIONS = ("exact", "fast", "int8")
# Of logits, relative to the largest. Fast and int8 round activations to 16 and 8 bits, here before
# the norm is applied and in the modules after it: now and then a value falls on the other side.
# Largest seen: 1.6e-6, 3.9e-4, 1.3e-2.
BOUND = {"exact": 1e-5, "fast": 2e-3, "int8": 5e-2}
# Of keys and values, which are also rounded to bfloat16: 4e-3 where that falls on the other side.
KV_BOUND = {"exact": 1e-5, "fast": 1e-2, "int8": 5e-2}
# Last and first of a block of 32, and of a split of 512.
BOUNDARIES = (31, 32, 33, 63, 64, 511, 512, 513)


def load(tmp_path, precision="exact", **options):
    config = {"max_position_embeddings": 2048} | options.pop("config", {})
    path = tiny.write_tiny(tmp_path / "model", config=config, **options).path
    return load_model(path, precision=precision)


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def keys_values(sequence, begin, end):
    """[2, layers, kv_heads, end - begin, head_dim] f32 out of a sequence's blocks."""
    found = []
    for position in range(begin, end):
        slab, row = sequence.pool.locate(sequence.block_table[position // 32])
        found.append(sequence.pool.slabs[slab][:, :, row, :, position % 32].float())
    return torch.stack(found, 3)


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


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "name",
    ["biases", "qwen2, every format", "biases of dense matrices", "many small heads", "no sharing"],
)
@torch.inference_mode()
def test_prompts_equal_the_modules(tmp_path, name, precision):
    """Chunks of 512 that end at multiples of it, after different starts, the last one short."""
    model = load(tmp_path, precision, **MODELS[name])
    plan = decode.DecodePlan(model)
    ids = torch.randint(model.config.vocab_size, (1100,)).tolist()
    for lengths in ((9,), (40, 33, 60), (530, 520), (512, 513), (1, 1040)):
        eager, planned, done = model.make_cache(1100), model.make_cache(1100), 0
        for count in lengths:
            part = ids[done : done + count]
            expected = model(torch.tensor([part]), [eager], logits_to_keep=1)[0]
            assert difference(plan.prefill(part, planned), expected) < BOUND[precision]
            place = done, done + count
            own, theirs = keys_values(planned, *place), keys_values(eager, *place)
            assert difference(own, theirs) < KV_BOUND[precision]
            done += count
            assert planned.tokens == eager.tokens == ids[:done]


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.inference_mode()
def test_rows_of_a_prompt_do_not_depend_on_rows_or_threads(tmp_path, precision):
    """Not even where the MLP takes its rows in parts."""
    wide = {"hidden_size": 64, "intermediate_size": 16384, "layers": 2}
    model = load(tmp_path, precision, **wide)
    plan = decode.DecodePlan(model)
    ids = torch.randint(model.config.vocab_size, (490,))
    rows = torch.empty(490, model.config.vocab_size)
    cache = model.make_cache(490)
    cache.reserve(490)
    plan.advance(ids, [cache], [490], rows)
    threads = torch.get_num_threads()
    for count, used in ((9, 1), (334, 3), (345, 2), (490, 1)):
        try:
            torch.set_num_threads(used)
            few = torch.empty(9, model.config.vocab_size)
            plan.advance(ids[:count], [cache], [count], few)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(few, rows[count - 9 : count])


def test_prompts_must_be_one_text(tmp_path):
    model = load(tmp_path)
    plan, cache = decode.DecodePlan(model), model.make_cache(64)
    cache.reserve(16)
    arguments = {
        "input": torch.arange(16),
        "positions": torch.arange(16),
        "rope": torch.stack(model.config.rope.rows(0, 16, 16), 1),
        "block_tables": torch.tensor([cache.block_table] * 16, dtype=torch.int32),
        "kv": cache.pool.slabs,
        "out": torch.empty(1, model.config.vocab_size),
    }
    wrong = torch.arange(16)
    wrong[11] = 12
    with pytest.raises(ValueError, match="row 11 of 16 does not continue the text of row 0"):
        ops.decode_step(plan.native.handle, **arguments | {"positions": wrong})
    ops.decode_step(plan.native.handle, **arguments)


@torch.inference_mode()
def test_an_interrupt_ends_a_prompt_between_layers(tmp_path):
    model = load(tmp_path, layers=8, hidden_size=64, intermediate_size=512)
    plan = decode.DecodePlan(model)
    ids = torch.randint(model.config.vocab_size, (1536,)).tolist()
    expected = plan.prefill(ids, model.make_cache(1536))
    inside = []

    def read_and_wait(cache):
        plan.prefill(ids, cache)
        signal.pause()

    def interrupt(_, frame):
        inside.append(frame.f_code.co_filename.endswith("_ops.py"))
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for attempt in range(1, 100):
            cache = model.make_cache(1536)
            signal.setitimer(signal.ITIMER_REAL, 0.002 * attempt)
            with pytest.raises(KeyboardInterrupt):
                read_and_wait(cache)
            assert cache.length % 512 == 0
            if cache.length < 1536:
                assert torch.equal(plan.prefill(ids[cache.length :], cache), expected)
            if inside[-1]:
                break
    finally:
        signal.signal(signal.SIGALRM, before)
    assert inside[-1]


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


def test_every_barrier_is_needed_and_enough(tmp_path, planted):
    plan = decode.DecodePlan(load(tmp_path)).native
    barriers = plan.barriers
    assert not plan.hazards(barriers)
    assert sum(barriers) == 5 * 2 + 2  # five steps a layer, the head, argmax; nothing before embed
    for i in [i for i, there in enumerate(barriers) if there]:
        without = [there and i != j for j, there in enumerate(barriers)]
        found = plan.hazards(without)
        assert found
        assert all(earlier < i <= later for earlier, later, _, _ in found)
        earlier, later, buffer, kind = found[0]
        planted(f"plan: no barrier before step {i}", f"steps {earlier}, {later}: {kind}, {buffer}")
    kinds = {kind for _, _, _, kind in plan.hazards([False] * len(barriers))}
    assert kinds == {"read after write", "write after read", "write after write"}


def test_barriers_follow_from_what_the_steps_declare(tmp_path):
    """Computed once more from the text of ``describe``, by somebody else."""
    plan = decode.DecodePlan(load(tmp_path)).native
    lines = [line for line in plan.describe().splitlines() if not line.startswith("----")]
    expected, reads, writes = [], set(), set()  # of the steps since the last barrier
    for line in lines:
        step = re.search(r"reads (\S+) writes (\S+)$", line)
        step_reads, step_writes = (set(names.split(",")) for names in step.groups())
        must_wait = bool(writes & (step_reads | step_writes) or reads & step_writes)
        expected.append(must_wait)
        if must_wait:
            reads, writes = set(), set()
        reads |= step_reads
        writes |= step_writes
    assert plan.barriers == expected


def test_describe_lists_steps_bytes_and_barriers(tmp_path):
    model = load(tmp_path, overrides={"model.layers.0.self_attn.k_proj": False})
    plan = decode.DecodePlan(model)
    lines = plan.describe().splitlines()
    assert [line.split()[1] for line in lines if not line.startswith("----")][:6] == [
        "embed",
        "norm_qkv_rope_append",
        "attention",
        "output_residual",
        "norm_gate_up_swiglu",
        "down_residual",
    ]
    assert (
        "[64, 64] 4b/g32 + [32, 64] dense + [32, 64] 4b/g32  reads hidden writes q,kv" in lines[2]
    )
    assert lines.count("---- barrier") == sum(plan.native.barriers)
    assert 0 < plan.native.weight_bytes < model.checkpoint.weight_bytes * 2


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
