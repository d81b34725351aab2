"""Slips planted in the host code of csrc/metal, each found by the tests in tests/macos."""

import json
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "macos"))
import standin_build

MACOS = Path(standin_build.__file__).parent
OPS = "csrc/metal/ops_mps.mm", "test_metal_ops_mps.py"
ENCODER = "csrc/metal/encoder.cpp", "test_metal_decode_plan.py"
PLAN = "csrc/plan/plan.cpp", "test_metal_plan_memory.py"
STEP = "csrc/metal/decode_step_mps.cpp", "test_metal_decode_plan.py"
SLIPS = {
    "buffers swapped": (
        *OPS,
        "{w.weight, w.scales, w.biases, added,",
        "{w.weight, w.biases, w.scales, added,",
    ),
    "wrong index of the arguments": (
        *OPS,
        "function->setArg(index, args);",
        "function->setArg(index + 1, args);",
    ),
    "threadgroups for threads": (
        *OPS,
        "{launch.total(0), launch.total(1),",
        "{launch.groups[0], launch.total(1),",
    ),
    "no copy of unaligned x": (*OPS, "% 16 == 0 ? dense", "% 2 == 0 ? dense"),
    "dimensions swapped": (
        *OPS,
        "MatvecArgs{w.in_features, w.out_features,",
        "MatvecArgs{w.out_features, w.in_features,",
    ),
    "an operator is not registered": (*OPS, 'm.impl("embedding", &q4metal::mps::embedding);', ""),
    "wrong variant": (*OPS, "rows <= kMaxMatvecRows)", "rows <= kMaxMatvecRows + 1)"),
    "ids of the wrong size": (*OPS, "uint32_t(ids->element_size())", "8"),
    "barrier of the combining step": (*ENCODER, "longest));\n\n  sink.barrier();", "longest));\n"),
    "barriers": (*ENCODER, "if (plan_.barrier_before[i])", "if (false)"),
    "gate and up swapped": (
        *ENCODER,
        "bind(4, step.segments[1], sink);",
        "bind(4, step.segments[0], sink);",
    ),
    "norm of another index": (
        *ENCODER,
        "sink.buffer(12, memory_.at(step.norm));",
        "sink.buffer(12, memory_of(step.reads[0], pass, workspace));",
    ),
    "has_bias": (*ENCODER, "!= nullptr) << i", "!= nullptr)"),
    "layer": (*ENCODER, "uint32_t(step.layer)", "0u"),
    "grid of the head": (
        *ENCODER,
        "head_launch(shape.vocab_size)",
        "head_launch(shape.hidden_size)",
    ),
    "offset of a tensor": (
        *STEP,
        "uint64_t(t.storage_offset() * t.element_size())",
        "uint64_t(t.storage_offset())",
    ),
    "table stride": (*STEP, "uint32_t(block_tables.size(1))", "uint32_t(block_tables.size(0))"),
    "hidden is not declared as read": (*PLAN, "{partial, hidden}, {hidden}", "{partial}, {hidden}"),
    "the cache is not declared as written": (*PLAN, "{queries, cache}});", "{queries}});"),
    "hidden is declared and not read": (
        *PLAN,
        "{queries, cache}, {partial}",
        "{queries, cache, hidden}, {partial}",
    ),
}


def run_with(file, test, text, slip, output):
    """Write what pytest says of the test file with the slip in the host code."""
    os.environ["Q4METAL_SLIP"] = json.dumps([file, text, slip])
    os.chdir(MACOS)
    with output.open("w") as said, redirect_stdout(said), redirect_stderr(said):
        pytest.main(["-x", "--tb=line", "-k", "not smollm2", test])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """By name; two at a time, for most of it runs on one core. All share what has no slip.

    Each is a fork of a process that has imported torch and computed nothing.
    """
    standin_build.build()
    folder = tmp_path_factory.mktemp("slips")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytest"])

    def run(number, slip):
        output = folder / f"{number}.txt"
        process = context.Process(target=run_with, args=(*slip, output))
        process.start()
        process.join()
        return output.read_text()

    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(run, range(len(SLIPS)), SLIPS.values())
        return dict(zip(SLIPS, runs, strict=True))


@pytest.mark.parametrize("name", SLIPS)
def test_slip_is_found(outputs, planted, name):
    """By a test or what follows it; an error of the compiler is not what finds it."""
    found = [w for w in outputs[name].splitlines() if w.startswith(("FAILED", "ERROR"))]
    assert found, outputs[name]
    assert "ERROR at setup" not in outputs[name], outputs[name]
    planted(f"{Path(SLIPS[name][0]).name}: {name}", found[0])
