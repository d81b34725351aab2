"""The decode plan against the modules that it stands for, and its barriers against its hazards."""

import threading

import pytest
import tiny
import torch

from torch_q4metal import decode, ops
from torch_q4metal.errors import ContextLengthError
from torch_q4metal.models import load_model

MODELS = {
    "tied": {},
    "untied": {"tied": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"family": "qwen2", "tied": False},
    "mixed bits": {
        "overrides": {
            "model.layers.0.self_attn.v_proj": {"bits": 6, "group_size": 32},
            "model.layers.1.self_attn.k_proj": {"bits": 8, "group_size": 64},
            "model.layers.0.mlp.down_proj": {"bits": 3, "group_size": 32},
            "model.embed_tokens": {"bits": 8, "group_size": 32},
        }
    },
    "dense leftovers": {
        "overrides": {"model.layers.0.self_attn.k_proj": False, "model.layers.1.mlp.up_proj": False}
    },
    "dense head": {"tied": False, "overrides": {"lm_head": False, "model.embed_tokens": False}},
    "odd heads": {"heads": 3, "kv_heads": 1, "head_dim": 36, "hidden_size": 96},
    "float16": {"dtype": torch.float16},
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
# Relative to the largest logit. Fast rounds activations to 16 bits, here before the norm is applied
# and in the modules after it.
BOUND = {"exact": 1e-5, "fast": 2e-3}


def load(tmp_path, precision="exact", **options):
    path = tiny.write_tiny(tmp_path / "model", **options).path
    return load_model(path, precision=precision)


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_modules(tmp_path, name, precision):
    model = load(tmp_path, precision, **MODELS[name])
    plan = decode.DecodePlan(model)
    eager, planned = model.make_cache(200), model.make_cache(200)
    ids = torch.randint(model.config.vocab_size, (100,))
    with torch.inference_mode():
        model(ids[None, :29], [eager])
        model(ids[None, :29], [planned])
        for i in range(29, 37):  # over the boundary of a block
            expected = model(ids[None, i : i + 1], [eager])[0, -1]
            assert (
                difference(plan.forward([[int(ids[i])]], [planned])[0], expected) < BOUND[precision]
            )
        # Several tokens of one text, from the plan's own keys and values.
        expected = model(ids[None, 37:44], [eager])[0, -1]
        assert (
            difference(plan.forward([ids[37:44].tolist()], [planned])[0], expected)
            < BOUND[precision]
        )
    assert planned.tokens == eager.tokens


def test_long_contexts_are_split_and_joined(tmp_path):
    model = load(tmp_path, config={"max_position_embeddings": 2048})
    plan = decode.DecodePlan(model)
    ids = torch.randint(model.config.vocab_size, (1300,))
    for length in (511, 512, 513, 1024, 1290):
        eager, planned = model.make_cache(1300), model.make_cache(1300)
        with torch.inference_mode():
            model(ids[None, :length], [eager])
            model(ids[None, :length], [planned])
            expected = model(ids[None, length : length + 1], [eager])[0, -1]
            assert difference(plan.forward([[int(ids[length])]], [planned])[0], expected) < 1e-5


@pytest.mark.parametrize("precision", ["exact", "fast"])
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
        ({"input": torch.tensor([5] * 9)}, ValueError, "takes 1 to 8 token ids"),
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


def test_every_barrier_is_needed_and_enough(tmp_path):
    plan = decode.DecodePlan(load(tmp_path)).native
    barriers = plan.barriers
    assert not plan.hazards(barriers)
    assert sum(barriers) == 5 * 2 + 2  # five steps a layer, the head, argmax; nothing before embed
    for i in [i for i, there in enumerate(barriers) if there]:
        without = [there and i != j for j, there in enumerate(barriers)]
        found = plan.hazards(without)
        assert found
        assert all(earlier < i <= later for earlier, later, _, _ in found)
    kinds = {kind for _, _, _, kind in plan.hazards([False] * len(barriers))}
    assert kinds == {"read after write", "write after read", "write after write"}


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


def test_two_threads_share_a_plan_and_a_freed_model_s_file_may_go(tmp_path):
    model = load(tmp_path)
    plan = decode.DecodePlan(model)
    (tmp_path / "model" / "model.safetensors").unlink()
    expected = plan.forward([[7]], [model.make_cache(64)])
    failures = []

    def call():
        for _ in range(30):
            if not torch.equal(plan.forward([[7]], [model.make_cache(64)]), expected):
                failures.append(1)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not failures
