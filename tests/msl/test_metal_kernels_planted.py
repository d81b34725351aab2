"""Bugs planted in the kernels' text: each is found by the comparison or by the check build."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from . import metal_ops, metal_plan
from .build import cache_folder
from .library import MetalRunError
from .metal_ops import DTYPES, METAL, Runner, compile_kernels, kernel_of
from .metal_plan import PlanRunner, Settings, compile_plan, plan_kernel
from .operands import assert_products, random_packed, random_x, vector
from .test_metal_kernels_plan import (
    attention_in_float64,
    drawn,
    neighbours,
    normed,
    product,
    random_cache,
    random_matrix,
)

F32, F16, _ = DTYPES


def matvec() -> None:
    case = {"bits": 4, "group_size": 32, "x": F32, "scales": F16, "n": 9, "k": 96}
    runner = Runner(compile_kernels([kernel_of("matvec", 4, 32, x=F32, scales=F16)], "check"))
    w, x, bias = random_packed(case), random_x(1, 96, F32), vector(9, F32)
    y = runner.matmul(x, *w, bias, group_size=32, bits=4, matvec=True)
    assert_products(y, x, w, bias, case)


def matmul() -> None:
    case = {"bits": 4, "group_size": 32, "x": F16, "scales": F16, "n": 70, "k": 96}
    kernel = kernel_of("matmul", 4, 32, x=F16, scales=F16, rows=17)
    runner = Runner(compile_kernels([kernel], "check"))
    w, x, bias = random_packed(case), random_x(17, 96, F16), vector(70, F32)
    y = runner.matmul(x, *w, bias, group_size=32, bits=4)
    assert_products(y, x, w, bias, case, tile=F16)


def assert_near(y: Tensor, exact: Tensor) -> None:
    error = float((y.double() - exact).abs().max())
    assert error <= 1e-4, f"results are wrong by {error:.2g}"


def residual() -> None:
    kernel = plan_kernel("residual", [(4, 32, 0)])
    m, x, hidden = random_matrix((4, 32, F32), 9, 96, True), torch.randn(1, 96), torch.randn(1, 9)
    y = PlanRunner(compile_plan([kernel], "check")).residual(m, x, hidden)
    assert_near(y, hidden.double() + product(m, x))


def head() -> None:
    kernel = plan_kernel("head", [(4, 32, 0)])
    m, hidden = random_matrix((4, 32, F32), 9, 96), 3 * torch.randn(1, 96)
    y = PlanRunner(compile_plan([kernel], "check")).head(m, torch.ones(96), hidden, 1e-5)
    assert_near(y, product(m, normed(hidden, torch.ones(96))))


def attention() -> None:
    steps = ("attention", "attention_split", "attention_combine")
    kernels = [plan_kernel(s, head_dim=16, shared=2) for s in steps]
    runner = PlanRunner(compile_plan(kernels, "check"))
    at = torch.tensor([140])
    cache, queries = random_cache(at, 2, 16, F32), torch.randn(1, 64)
    exact = attention_in_float64(queries, at, cache, 0.25)
    for split in (False, True):
        out = runner.attention(queries, at, cache, 0.25, split)
        assert_near(out, exact)


def sample() -> None:
    runner = PlanRunner(compile_plan([plan_kernel("sample")], "check"))
    settings = [Settings(5.0, 0.0, 0.0, s % 2, s) for s in range(8)]  # one token, or all
    logits, at = torch.randn(8, 40), torch.arange(8)
    tokens = runner.sample(logits, settings, at).tolist()
    expected = [drawn(logits[m], s, m) for m, s in enumerate(settings)]
    assert tokens == expected, f"tokens {tokens} are wrong"


def sample_neighbours() -> None:
    runner = PlanRunner(compile_plan([plan_kernel("sample")], "check"))
    logits = torch.stack([neighbours(40, 1.0) for _ in range(8)])
    settings = [Settings(5.0, 0.0, 0.0, 1, seed) for seed in range(8)]
    tokens = runner.sample(logits, settings, torch.arange(8)).tolist()
    assert tokens == logits.argmax(-1).tolist(), f"tokens {tokens} are wrong"


@dataclass(frozen=True)
class Bug:
    """What is wrong, where, and what shows it."""

    name: str
    file: str
    right: str
    wrong: str
    run: Callable[[], None]


BUGS = [
    Bug("rows past N are read", "q4_matvec.metal", "min(first + f, args.out_features - 1)",
        "first + f", matvec),
    Bug("rows past N are stored", "q4_matvec.metal",
        "lane == 0 && first + f < args.out_features", "lane == 0", matvec),
    Bug("a threadgroup computes its neighbour's rows too", "q4_matvec.metal",
        "simdgroup) * kMatvecFeatures", "simdgroup) * 3", matvec),
    Bug("groups of the wrong size", "q4.h", "feature + k / kGroup", "feature + k / (2 * kGroup)",
        matvec),
    Bug("the sum of x is not of x itself", "q4.h", "(x[2] + x[3])", "(x[2] + x[2])", matvec),
    Bug("nibbles are not divided by their place", "q4.h", "if (Stream::place(j) != 1)",
        "if (Stream::place(j) > 16)", matvec),
    Bug("no barrier between slices", "q4_matmul.metal",
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    if (at >= reduced)",
        "if (at >= reduced)", matmul),
    Bug("a barrier that orders nothing", "q4_matmul.metal",
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    if (at >= reduced)",
        "threadgroup_barrier(mem_flags::mem_none);\n    if (at >= reduced)", matmul),
    Bug("slices of x from the other buffer", "q4_matmul.metal",
        "pool + (turn ^ 1) * P::kPair", "pool + turn * P::kPair", matmul),
    Bug("rows past M are stored", "q4_matmul.metal", "if (row + m < rows)", "", matmul),
    Bug("the tile's memory is a row short", "q4_matmul.metal",
        "enum { kX = kTileRows * Slice<T>", "enum { kX = (kTileRows - 8) * Slice<T>", matmul),
    Bug("hidden is overwritten", "plan_matvec.metal", "first + f] +=\n", "first + f] =\n",
        residual),
    Bug("a one is taken from the mean of squares", "plan_rows.h", "/ float(in_features) + eps",
        "/ float(in_features) - 1.0f", head),
    Bug("squares of three of four", "plan_rows.h", "fma(h.w, h.w, squares[row])", "squares[row]",
        head),
    Bug("the last block counts as full", "plan_attention.metal",
        "count = min(end - first, uint(kBlockPositions))", "count = uint(kBlockPositions)",
        attention),
    Bug("chunks are not weighed", "plan_attention.metal",
        "sum = fma(chunks[c * stride + d], weight, sum)", "sum += chunks[c * stride + d]",
        attention),
    Bug("no barrier before chunks are added", "plan_attention.metal",
        "threadgroup_barrier(mem_flags::mem_threadgroup);", "", attention),
    Bug("values from the keys", "plan_cache.h", "ulong(part * args.layers + args.layer)",
        "ulong(args.layer)", attention),
    Bug("one token too many", "plan_sample.metal", "next.count < most", "next.count <= most",
        sample),
    Bug("a digit with a sign", "plan_sample.metal", "int(key >> shift & (kBuckets - 1))",
        "int(key >> shift) % kBuckets", sample_neighbours),
    Bug("more threads than registers may allow", "plan_sample.metal",
        "[[kernel, max_total_threads_per_threadgroup(kTokenThreads)]] void", "kernel void", sample),
    Bug("no barrier before the second choice", "plan_sample.metal",
        "threadgroup_barrier(mem_flags::mem_threadgroup); // values_of", "// values_of", sample),
]  # fmt: skip


def broken_copy(bug: Bug) -> Path:
    """csrc/metal with the bug, at a place that is the same in each run: builds are kept by it."""
    folder = cache_folder() / "planted" / re.sub(r"\W+", "-", bug.name)
    copy = folder / "metal"
    ignored = shutil.ignore_patterns("*.mm", "*.cpp", "*.py", "__*")
    shutil.copytree(METAL, copy, ignore=ignored, dirs_exist_ok=True)
    shutil.copy(METAL.parent / "layout.h", folder)
    text = (METAL / bug.file).read_text()
    assert text.count(bug.right) == 1, "the text to break is gone, or not alone"
    (copy / bug.file).write_text(text.replace(bug.right, bug.wrong))
    return copy


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(
    bug: Bug, monkeypatch: pytest.MonkeyPatch, planted: Callable[[str, object], None]
) -> None:
    copy = broken_copy(bug)
    kernel_of("matvec", 4, 32), plan_kernel("copy")  # names come from the whole text
    monkeypatch.setattr(metal_ops, "METAL", copy)
    monkeypatch.setattr(metal_plan, "METAL", copy)
    with pytest.raises((MetalRunError, AssertionError)) as found:
        bug.run()
    planted(f"{bug.file}: {bug.name}", found.value)


@pytest.mark.parametrize(
    "run", [matvec, matmul, residual, head, attention, sample, sample_neighbours]
)
def test_without_a_bug_nothing_is_found(run: Callable[[], None]) -> None:
    run()
