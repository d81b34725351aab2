"""Decode plans of parts of a model: one after the other they are the whole model's plan."""

import pytest
import tiny
import torch

from torch_q4metal import decode, ops
from torch_q4metal.models import load_model

LAYERS = 4


@pytest.fixture(params=[("llama", True, "fast"), ("qwen2", False, "exact")])
def plans(request, tmp_path):
    """(the whole model with its plan, [(model, plan) of its parts])."""
    family, tied, precision = request.param
    path = tiny.write_tiny(tmp_path / "m", family, tied=tied, layers=LAYERS).path
    parts = [range(1), range(1, 3), range(3, LAYERS)]
    models = [load_model(path, precision=precision, layers=part) for part in (None, *parts)]
    whole, *stages = [(model, decode.DecodePlan(model)) for model in models]
    return whole, stages


@torch.inference_mode()
def test_stages_in_turn_have_the_bits_of_the_whole(plans):
    (model, plan), stages = plans
    ids = torch.randint(260, (3, 8))
    cache = model.make_cache(64)
    caches = [stage.make_cache(64) for stage, _ in stages]
    for step in range(3):
        for sequence in (cache, *caches):
            sequence.reserve(8)
        expected = plan.advance(ids[step], [cache], [8])
        x = ids[step]
        for (_, stage_plan), sequence in zip(stages, caches, strict=True):
            x = stage_plan.advance(x, [sequence], [8])
        assert torch.equal(x, expected)
        for sequence in (cache, *caches):
            sequence.append(ids[step].tolist())
    kept = torch.cat([sequence.pool.slabs[0][:, :, 0] for sequence in caches], 1)
    assert torch.equal(kept[..., :24, :], cache.pool.slabs[0][:, :, 0, :, :24])


def test_a_stage_has_its_own_ends_and_weights(plans):
    (_, plan), stages = plans
    kinds = [
        [line.split()[1] for line in stage.describe().splitlines() if not line.startswith("----")]
        for _, stage in stages
    ]
    assert [(own[0], own[-1]) for own in kinds] == [
        ("embed", "give_hidden"), ("take_hidden", "give_hidden"), ("take_hidden", "argmax"),
    ]  # fmt: skip
    assert [len(own) for own in kinds] == [5 * 1 + 2, 5 * 2 + 2, 5 * 1 + 3]
    assert sum(s.native.weight_bytes for _, s in stages) == plan.native.weight_bytes


def test_every_barrier_of_a_stage_is_needed_and_enough(plans):
    for _, stage in plans[1]:
        barriers = stage.native.barriers
        assert not stage.native.hazards(barriers)
        for i in [i for i, there in enumerate(barriers) if there]:
            without = [there and i != j for j, there in enumerate(barriers)]
            assert stage.native.hazards(without)


def test_wrong_ends_are_told(plans):
    model, plan = plans[1][1]
    cache = model.make_cache(32)
    cache.reserve(1)
    good = {
        "input": torch.zeros(1, 64),
        "positions": torch.tensor([0]),
        "rope": torch.stack(model.config.rope.rows(0, 1, 1), 1),
        "block_tables": torch.tensor([cache.block_table], dtype=torch.int32),
        "kv": cache.pool.slabs,
        "out": torch.empty(1, 64),
    }
    for change, sentence in [
        ({"input": torch.tensor([5])}, "residual rows"),
        ({"input": torch.zeros(1, 63)}, "input is Float"),
        ({"input": torch.zeros(1, 64).half()}, "input is Half"),
        ({"out": torch.empty(1, 260)}, "out is Float"),
        ({"out": torch.empty(1, dtype=torch.int64)}, "out is Long"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            ops.decode_step(plan.native.handle, **good | change)
    ops.decode_step(plan.native.handle, **good)
