"""The decode plan reads prompts as the modules do, in chunks of 512 rows."""

import signal

import pytest
import torch
from plan_models import KV_BOUND, MODELS, PRECISIONS, PROMPT_BOUND, difference, keys_values, load

from torch_q4metal import decode, ops


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
            assert difference(plan.prefill(part, planned), expected) < PROMPT_BOUND[precision]
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
