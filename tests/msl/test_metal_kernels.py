"""The Metal text of matvec, embedding and codec, executed: against float64 and the CPU's operators,
bit for bit between numbers of rows, and watched in three run orders."""

from functools import cache

import pytest
import torch
from torch import Tensor

from torch_q4metal import ops, reference

from .metal_ops import DTYPES, Kernel, Runner, compile_kernels, kernel_of
from .operands import K_SIZES, N_SIZES, Packed, assert_products, random_packed, random_x, vector
from .pairwise import Choice, choices, pairs_of, pairwise

BITS = reference.BITS
GROUP_SIZES = reference.GROUP_SIZES
ORDERS = ("forward", "reverse", "shuffled")


def fits(case: Choice) -> bool:
    return case["k"] % case["group_size"] == 0


# ---- matvec


@cache
def matvec_formats() -> list[Choice]:
    """Three formats for each width, each alone and with three other numbers of rows."""
    found = []
    for i, bits in enumerate(BITS):
        for j, group_size in enumerate(GROUP_SIZES):
            x, scales = DTYPES[(i + j) % 3], DTYPES[(2 * (i + j) + i // 2) % 3]
            several = [2 + (j + 2 * r + 2 * i) % 7 for r in range(3)]
            found += [
                {"bits": bits, "group_size": group_size, "x": x, "scales": scales, "rows": rows}
                for rows in (1, *several)
            ]
    return found


def matvec_kernel(case: Choice) -> Kernel:
    return kernel_of(
        "matvec",
        case["bits"],
        case["group_size"],
        x=case["x"],
        scales=case["scales"],
        rows=case["rows"],
    )


def matvec_cases() -> list[Choice]:
    shapes = choices(n=N_SIZES, k=K_SIZES, bias=(None, *DTYPES))
    return pairwise([matvec_formats(), *shapes], fits)


def run_matvec(runner: Runner, case: Choice, x: Tensor, w: Packed, bias: Tensor | None) -> Tensor:
    return runner.matmul(x, *w, bias, group_size=case["group_size"], bits=case["bits"], matvec=True)


def test_matvec_formats_hold_every_pair_of_bits_group_sizes_rows_and_dtypes() -> None:
    covered = set().union(*map(pairs_of, matvec_formats()))
    wanted = pairwise(
        choices(bits=BITS, group_size=GROUP_SIZES, x=DTYPES, scales=DTYPES, rows=range(1, 9))
    )
    assert set().union(*map(pairs_of, wanted)) <= covered


def test_matvec_against_float64_and_the_cpu_and_a_row_alone() -> None:
    runner = Runner(compile_kernels(map(matvec_kernel, matvec_formats())))
    for case in matvec_cases():
        w, x = random_packed(case), random_x(case["rows"], case["k"], case["x"])
        bias = vector(case["n"], case["bias"])
        y = run_matvec(runner, case, x, w, bias)
        assert_products(y, x, w, bias, case)
        for m in range(case["rows"]):
            alone = run_matvec(runner, case, x[m : m + 1].clone(), w, bias)
            assert torch.equal(y[m : m + 1], alone), (case, m)


def test_matvec_is_watched_in_three_run_orders() -> None:
    formats = matvec_formats()[::6]  # two of each width, alone and with others
    shapes = choices(n=(1, 7, 8, 9), k=(32, 64, 96, 128, 576, 640, 896), bias=(None, DTYPES[1]))
    watched = Runner(compile_kernels(map(matvec_kernel, formats), "check"))
    for case in pairwise([formats, *shapes], fits):
        w, x = random_packed(case), random_x(case["rows"], case["k"], case["x"])
        bias = vector(case["n"], case["bias"])
        results = [run_matvec(watched.with_order(o), case, x, w, bias) for o in ORDERS]
        assert_products(results[0], x, w, bias, case)
        assert all(torch.equal(results[0], other) for other in results[1:]), case


# ---- rows of the table


EXPAND = choices(bits=BITS, group_size=GROUP_SIZES, scales=DTYPES, out=DTYPES)


@cache
def expand_formats() -> list[Choice]:
    return pairwise(EXPAND)


def expand_kernel(op: str, case: Choice) -> Kernel:
    return kernel_of(op, case["bits"], case["group_size"], scales=case["scales"], out=case["out"])


@pytest.mark.parametrize("mode", ["typed", "check"])
def test_embedding_and_dequantize_have_the_bits_of_the_cpu(mode: str) -> None:
    tables = Runner(
        compile_kernels([expand_kernel("embedding", f) for f in expand_formats()], mode)
    )
    codec = Runner(
        compile_kernels([expand_kernel("dequantize", f) for f in expand_formats()], mode)
    )
    sizes = K_SIZES if mode == "typed" else (32, 64, 96, 576, 896, 1152)
    shapes = choices(n=N_SIZES, k=sizes, ids=(torch.int32, torch.int64))
    for i, case in enumerate(pairwise([expand_formats(), *shapes], fits)):
        w = random_packed(case)
        numbers = {name: case[name] for name in ("bits", "group_size")}
        order = ORDERS[i % 3]
        dense = codec.with_order(order).expand(*w, dtype=case["out"], **numbers)
        cpu = ops.dequantize(*w, dtype=case["out"], **numbers)
        assert torch.equal(dense, cpu), case
        assert torch.equal(dense, reference.dequantize(*w, dtype=case["out"], **numbers)), case
        ids = torch.randint(case["n"], (5,), dtype=case["ids"])
        rows = tables.with_order(order).expand(*w, ids, dtype=case["out"], **numbers)
        assert torch.equal(rows, dense[ids.long()]), case


def test_an_id_outside_of_the_table_gives_a_row_of_nan() -> None:
    case = {"bits": 4, "group_size": 32, "scales": DTYPES[1], "out": DTYPES[2], "n": 7, "k": 96}
    runner = Runner(compile_kernels([expand_kernel("embedding", case)], "check"))
    for dtype, high in ((torch.int32, 2**31 - 1), (torch.int64, 2**32 + 1)):
        ids = torch.tensor([6, 7, -1, high, 0], dtype=dtype)
        w = random_packed(case)
        rows = runner.expand(*w, ids, group_size=32, bits=4, dtype=case["out"])
        assert rows.isnan().all(-1).tolist() == [False, True, True, True, False]


# ---- quantize


QUANTIZE = pairwise(choices(bits=BITS, group_size=GROUP_SIZES, x=DTYPES))


def quantize_kernel(case: Choice) -> Kernel:
    return kernel_of("quantize", case["bits"], case["group_size"], x=case["x"])


def matrix_to_quantize(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random rows; if there are enough also zeros, a constant, one sign only, ties, tiny ones."""
    w = torch.randn(rows, columns)
    kinds = [
        torch.zeros(columns),
        torch.full((columns,), -0.75),
        w[0].abs(),
        -w[0].abs(),
        (torch.arange(columns) % 32 - 10) / 8,
        w[0] * 1e-9,
    ]
    for i, kind in enumerate(kinds[: rows - 1]):
        w[i + 1] = kind
    return w.to(dtype)


@pytest.mark.parametrize("mode", ["typed", "check"])
def test_quantize_has_the_bits_of_the_cpu(mode: str) -> None:
    runner = Runner(compile_kernels(map(quantize_kernel, QUANTIZE), mode))
    sizes = K_SIZES if mode == "typed" else (32, 96, 128, 576)
    for i, case in enumerate(pairwise([QUANTIZE, *choices(n=N_SIZES, k=sizes)], fits)):
        w = matrix_to_quantize(case["n"], case["k"], case["x"])
        numbers = {name: case[name] for name in ("bits", "group_size")}
        ours = runner.with_order(ORDERS[i % 3]).quantize(w, **numbers)
        for name, a, b, c in zip(
            ("weight", "scales", "biases"),
            ours,
            ops.quantize(w, **numbers),
            reference.quantize(w, **numbers),
            strict=True,
        ):
            assert torch.equal(a, b), (name, case)
            assert torch.equal(a, c), (name, case)
