"""Slips planted in the host code of csrc/metal, each found by the tests in tests/macos."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MACOS = Path(__file__).parent.parent / "macos"
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


@pytest.mark.parametrize("name", SLIPS)
def test_slip_is_found(planted, name):
    file, test, text, slip = SLIPS[name]

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | {"Q4METAL_SLIP": json.dumps([file, text, slip])},
            cwd=MACOS, capture_output=True, text=True, check=False,
        )  # fmt: skip

    code = f"import sys; sys.path.insert(0, {str(MACOS.parent)!r})\n"
    built = run("-c", code + "import standin_build; standin_build.build()")
    assert built.returncode == 0, built.stderr  # to the compiler it is no error
    tests = run("-m", "pytest", "-x", "--tb=line", "-k", "not smollm2", test)
    assert tests.returncode != 0, tests.stdout
    found = [w for w in tests.stdout.splitlines() if w.startswith(("FAILED", "ERROR"))]
    planted(f"{Path(file).name}: {name}", found[0] if found else tests.stderr)
