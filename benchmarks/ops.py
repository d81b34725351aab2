"""The matrix product alone, against torch's own 4-bit op: ``python benchmarks/ops.py``.

torch.ops.q4metal.matmul on MLX's format in place, and torch.ops.aten._weight_int4pack_mm_for_cpu on
the same weights, repacked by torch's own _convert_weight_to_int4pack_for_cpu, with float32 or
bfloat16 activations, whichever is faster there (one of them may be 30 times slower). In each round
each goes over as many copies of the matrix as make --megabytes, so that weights come from memory,
as in a model. Ratios are medians of the rounds' own.
Results are checked against float64: relative rms below 1e-4 (ours to 8 rows), 3e-3 (ours above,
fast), 2e-2 (int8; torch's).

Writes benchmarks/results/<date>-<cpu>-ops.md and .json.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor

from torch_q4metal import ops

GROUP_SIZE = 64
SETTLE = 0.02  # seconds: OpenMP's idle threads spin for a while


class Matrices:
    """Copies of one packed matrix [N, K], each with its own memory, in both formats."""

    def __init__(self, rows: int, columns: int, megabytes: int) -> None:
        self.rows, self.columns = rows, columns
        size = rows * columns * 9 // 16
        self.count = max(1, -(-megabytes * 10**6 // size))
        torch.manual_seed(0)
        self.codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        size_of_scale = 0.2 / columns**0.5
        groups = (rows, columns // GROUP_SIZE)
        self.scales = (size_of_scale * (0.75 + torch.rand(groups) / 2)).half()
        self.biases = self.scales * -7.5
        packed = _pack(self.codes)
        self.ours = [
            (packed.clone(), self.scales.clone(), self.biases.clone()) for _ in range(self.count)
        ]
        tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.codes, 2)
        self.theirs = [tiles.clone() for _ in range(self.count)]
        # Their W is (code - 8) * scale + zero, with scale and zero side by side, groups first.
        zeros = self.biases.float() + 8 * self.scales.float()
        both = torch.stack([self.scales.float(), zeros], -1).transpose(0, 1).contiguous()
        self.scale_and_zeros = {torch.float32: both, torch.bfloat16: both.bfloat16()}

    def exact(self, x: Tensor) -> Tensor:
        """x W^T in float64, some rows of W at a time."""
        parts = []
        for begin in range(0, self.rows, 1024):
            rows = slice(begin, begin + 1024)
            scales, biases = (
                part[rows].double().repeat_interleave(GROUP_SIZE, 1)
                for part in (self.scales, self.biases)
            )
            parts.append(x.double() @ (scales * self.codes[rows] + biases).T)
        return torch.cat(parts, 1)


def _pack(codes: Tensor) -> Tensor:
    """int32 [N, K / 8], the first code in the lowest bits."""
    groups = codes.unflatten(1, (-1, 8)).long() << torch.arange(0, 32, 4)
    words = groups.sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def contestants(
    matrices: Matrices, x: Tensor, with_int8: bool
) -> dict[str, tuple[Callable[[int], Tensor], float]]:
    """Name -> (product with copy i, largest relative rms error)."""

    def ours(precision: str) -> Callable[[int], Tensor]:
        return lambda i: ops.matmul(x, *matrices.ours[i], precision=precision)

    def theirs(dtype: torch.dtype) -> Callable[[int], Tensor]:
        cast, scales = x.to(dtype), matrices.scale_and_zeros[dtype]
        return lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(
            cast, matrices.theirs[i], GROUP_SIZE, scales
        )

    found = {"ours": (ours("fast"), 1e-4 if len(x) <= 8 else 3e-3)}
    if with_int8:
        found["ours int8"] = (ours("int8"), 2e-2)
    products = {"torch f32": theirs(torch.float32), "torch bf16": theirs(torch.bfloat16)}
    faster = min(products, key=lambda name: _seconds(products[name], 1))
    found[faster] = (products[faster], 2e-2)
    return found


def _seconds(product: Callable[[int], Tensor], count: int) -> float:
    """Seconds a product, over that many copies, after one call that does not count."""
    product(0)
    begin = time.perf_counter()
    for i in range(count):
        product(i)
    return (time.perf_counter() - begin) / count


def measure(matrices: Matrices, rows: int, rounds: int, with_int8: bool) -> dict[str, Any]:
    """Seconds of one product, a round each, and errors."""
    x = torch.randn(rows, matrices.columns)
    x[:, ::97] *= 20  # outliers, as activations have
    wanted = matrices.exact(x)
    engines = contestants(matrices, x, with_int8)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    errors = {}
    for name, (product, bound) in engines.items():
        error = (product(0).double() - wanted).norm() / wanted.norm()
        errors[name] = error.item()
        if not error < bound:
            raise SystemExit(f"wrong result: {name}, {rows} rows: error {error:.1e} over {bound}")
    for number in range(rounds):
        names = list(engines)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            time.sleep(SETTLE)
            seconds[name].append(_seconds(engines[name][0], matrices.count))
    return {
        "out_features": matrices.rows,
        "in_features": matrices.columns,
        "rows": rows,
        "copies": matrices.count,
        "seconds": seconds,
        "errors": errors,
    }


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "# The product alone, against torch's int4 op",
        "",
        machine.one_line(results["machine"]) + ".",
        "",
        f"{results['threads']} threads, CPUs {results['cores'] or 'not pinned'}, kernels"
        f" {results['kernels']}, torch {results['torch']}; `{results['machine']['command']}`",
        "",
        "Medians in milliseconds; ratios are torch's time to ours, medians of the rounds' own."
        " Errors: relative rms against float64.",
        "",
        "| W [N, K] | rows | engine | ms | GB/s of weights | GFLOPS | error | torch / it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        count = case["out_features"] * case["in_features"]
        for name, seconds in case["seconds"].items():
            middle = statistics.median(seconds)
            lines.append(
                f"| {case['out_features']} x {case['in_features']} | {case['rows']} | {name}"
                f" | {middle * 1e3:.3f} | {count * 9 / 16 / middle / 1e9:.2f}"
                f" | {2 * count * case['rows'] / middle / 1e9:.0f} | {case['errors'][name]:.1e}"
                f" | {_ratio(case['seconds'], name)} |"
            )
    return "\n".join(lines) + "\n"


def _ratio(seconds: dict[str, list[float]], name: str) -> str:
    if not name.startswith("ours"):
        return "-"
    theirs = next(times for engine, times in seconds.items() if engine.startswith("torch"))
    ratios = [other / mine for other, mine in zip(theirs, seconds[name], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _shapes(text: str) -> list[tuple[int, int]]:
    return [(int(n), int(k)) for n, _, k in (part.partition("x") for part in text.split(","))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        type=_shapes,
        default="3584x3584,18944x3584,3584x18944",
        help="N x K of the matrices (those of Qwen2.5-7B)",
    )
    parser.add_argument("--rows", type=_numbers, default="1,8,32,128", help="rows of x")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (7)")
    parser.add_argument("--megabytes", type=int, default=256, help="of weights in a pass (256)")
    parser.add_argument("--threads", type=int, default=2, help="threads of both (2)")
    parser.add_argument(
        "--cores", type=_numbers, help="CPUs to pin to, as 0,1 (as many cores as threads)"
    )
    parser.add_argument("--int8", action="store_true", help="int8 activations too")
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args()
    cores = options.cores or machine.choose_cores(options.threads)
    if cores is not None:
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {
        "machine": machine.describe(),
        "threads": options.threads,
        "cores": cores,
        "kernels": ops.cpu_kernels(),
        "torch": torch.__version__,
        "cases": [],
    }
    for rows, columns in options.shapes:
        matrices = Matrices(rows, columns, options.megabytes)
        for count in options.rows:
            results["cases"].append(measure(matrices, count, options.rounds, options.int8))
            print(f"{rows} x {columns}, {count} rows: done", file=sys.stderr, flush=True)
    stem = options.results / machine.file_stem("ops")
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(stem.name + ".json").write_text(json.dumps(results, indent=1) + "\n")
    text = markdown(results)
    stem.with_name(stem.name + ".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
