"""What each step of a decode plan declares equals what its kernels really read and wrote, byte by
byte: barriers are placed by these declarations alone."""

import copy

import pytest
import tiny
import torch
from plan_memory import PassMemory, differences
from test_metal_decode_plan import SOME_DENSE, Texts

LONG = {"max_position_embeddings": 2048}
# lengths of the texts, the checkpoint, layers of the stage, what comes out
CASES = {
    "llama, logits": ([40, 3], {}, None, "logits"),
    "qwen2, dense matrices, greedy": (
        [31, 32], {"family": "qwen2", "overrides": SOME_DENSE, "tied": False}, None, "greedy",
    ),
    "llama, split attention, sampling": ([1200, 20], {"config": LONG}, None, "sampling"),
    "the first stage": ([0, 0], {}, range(1), "rows"),
    "the last stage": ([0, 0], {"family": "qwen2", "tied": False}, range(1, 2), "greedy"),
}  # fmt: skip


def memory_of_a_pass(path, mac, lengths, checkpoint, layers, result):
    """One step of a tiny model on MPS; what it was to touch, and what it did."""
    mac.mode = "check"
    tiny.write_tiny(path, **checkpoint)
    size = tiny.VOCAB_SIZE
    texts = Texts(path, [torch.randint(size, (n,)).tolist() for n in lengths], layers=layers)
    model, config, plan = texts.model, texts.model.config, texts.mps
    ids, positions, rope, tables = texts.arguments()
    rows = len(ids)
    x = ids.to("mps")
    if not model.part.embeds:
        x = torch.randn(rows, config.hidden_size).to("mps")
    tensors = {"ids" if model.part.embeds else "input": x}
    tensors |= {"rope": rope.to("mps"), "block_tables": tables.to("mps")}
    if result in ("greedy", "sampling"):
        name, out = "tokens", torch.empty(rows, dtype=torch.int64)
    else:
        name = "logits" if model.part.has_head else "output"
        out = torch.empty(rows, size if model.part.has_head else config.hidden_size)
    tensors[name] = out.to("mps")
    sampling = torch.zeros(rows, 6, dtype=torch.int32) if result == "sampling" else None
    torch.ops.q4metal.decode_step(
        plan.native.handle, x, positions, tensors["rope"], tensors["block_tables"], sampling,
        texts.slabs, tensors[name],
    )  # fmt: skip
    weights = {plan._address(tensor): tensor for tensor in list(plan._kept)}
    return PassMemory(
        mac.native, plan.native.handle, weights, tensors, texts.slabs, tables,
        positions.tolist(), ids.tolist() if model.part.embeds else None,
    ), texts  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_steps_touch_what_they_declare(tmp_path, mac, name):
    memory, _texts = memory_of_a_pass(tmp_path / "model", mac, *CASES[name])
    touched = memory.touched()
    steps = memory.steps if CASES[name][-1] != "logits" else memory.steps[:-1]  # no argmax
    for step, seen in zip(steps, touched, strict=True):
        assert differences(step, memory.declared(step), seen) == []


def test_a_declaration_too_few_or_too_many_is_found(tmp_path, mac):
    """Each that is left out, and each buffer of the plan that is added, in every step."""
    memory, _texts = memory_of_a_pass(
        tmp_path / "model", mac, *CASES["qwen2, dense matrices, greedy"]
    )
    buffers = {name for step in memory.steps for name in step.reads + step.writes}
    count = 0
    for step, seen in zip(memory.steps, memory.touched(), strict=True):
        for side in ("reads", "writes"):
            for name in sorted(buffers):
                wrong = copy.deepcopy(step)
                names = getattr(wrong, side)
                names.remove(name) if name in names else names.append(name)
                if step.layer < 0 and name == "kv":
                    continue  # which layer's?
                (found,) = differences(wrong, memory.declared(wrong), seen)
                assert f" {side} {name}" in found.replace("declares that it ", "")
                count += 1
        for address in step.weights:
            wrong = copy.deepcopy(step)
            wrong.weights.remove(address)
            (found,) = differences(wrong, memory.declared(wrong), seen)
            assert "reads weight" in found
            count += 1
    assert count > 200
