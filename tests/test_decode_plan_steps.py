"""The steps of a decode plan: what they read and write, and the barriers between them."""

import re

from plan_models import load

from torch_q4metal import decode


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
