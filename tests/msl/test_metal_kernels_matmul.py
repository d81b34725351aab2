"""The Metal text of the GEMM, executed: against float64 and the CPU's operator, bit for bit between
numbers of rows, and watched in three run orders."""

from functools import cache

import pytest
import torch
from torch import Tensor

from torch_q4metal import reference

from .metal_ops import DTYPES, Kernel, Runner, compile_kernels, kernel_of
from .operands import K_SIZES, N_SIZES, Packed, assert_products, random_packed, random_x, vector
from .pairwise import Choice, choices, pairs_of, pairwise

ORDERS = ("forward", "reverse", "shuffled")
ROWS = {16: (1, 2, 8, 9, 16), 32: (17, 32), 64: (33, 64, 65)}  # by the tile that they get


@cache
def formats() -> list[Choice]:
    return pairwise(
        choices(
            bits=reference.BITS,
            group_size=reference.GROUP_SIZES,
            x=DTYPES,
            scales=DTYPES,
            transpose=(True, False),
            exact=(False, True),
            tile=tuple(ROWS),
        )
    )


def kernel(case: Choice) -> Kernel:
    return kernel_of(
        "matmul" if case["transpose"] else "matmul_plain",
        case["bits"],
        case["group_size"],
        x=case["x"],
        scales=case["scales"],
        rows=case["rows"] if "rows" in case else case["tile"],
        exact=case["exact"],
    )


def with_rows() -> list[Choice]:
    return [case | {"rows": rows} for case in formats() for rows in ROWS[case["tile"]]]


def fits(case: Choice) -> bool:
    return case["k"] % case["group_size"] == 0


def tile_dtype(case: Choice) -> torch.dtype:
    """What W is rounded to: float32, unless a 16-bit result is to be fast."""
    out = torch.promote_types(case["x"], case["scales"])
    return torch.float32 if case["exact"] else out


def operands(case: Choice) -> tuple[Tensor, Packed, Tensor | None]:
    reduced, columns = case["k"], case["n"]
    if not case["transpose"]:
        reduced, columns = columns, reduced
    w = random_packed(case)
    return random_x(case["rows"], reduced, case["x"]), w, vector(columns, case["bias"])


def run(runner: Runner, case: Choice, x: Tensor, w: Packed, bias: Tensor | None) -> Tensor:
    numbers = {name: case[name] for name in ("bits", "group_size", "transpose", "exact")}
    return runner.matmul(x, *w, bias, **numbers)


def runners(mode: str) -> Runner:
    return Runner(compile_kernels(map(kernel, formats()), mode))


def check(case: Choice, y: Tensor, x: Tensor, w: Packed, bias: Tensor | None) -> None:
    assert_products(y, x, w, bias, case, case["transpose"], tile_dtype(case))


def cases() -> list[Choice]:
    shapes = choices(n=N_SIZES, k=K_SIZES, bias=(None, *DTYPES))
    return pairwise([with_rows(), *shapes], fits)


def test_cases_hold_every_pair_of_rows_shapes_and_formats() -> None:
    factors = choices(
        bits=reference.BITS, group_size=reference.GROUP_SIZES, x=DTYPES, scales=DTYPES,
        transpose=(True, False), exact=(False, True), rows=sum(ROWS.values(), ()), n=N_SIZES,
        k=K_SIZES, bias=(None, *DTYPES),
    )  # fmt: skip
    wanted = set().union(*map(pairs_of, pairwise(factors, fits)))
    assert wanted <= set().union(*map(pairs_of, cases()))


def test_matmul_against_float64_and_the_cpu() -> None:
    runner = runners("typed")
    for case in cases():
        x, w, bias = operands(case)
        check(case, run(runner, case, x, w, bias), x, w, bias)


def test_matmul_is_watched_in_three_run_orders() -> None:
    runner = runners("check")
    shapes = choices(n=(1, 9, 65), k=(32, 96, 128), bias=(None, DTYPES[1]))
    last = [case | {"rows": ROWS[case["tile"]][0]} for case in formats()]
    for case in pairwise([last, *shapes], fits):
        x, w, bias = operands(case)
        results = [run(runner.with_order(o), case, x, w, bias) for o in ORDERS]
        check(case, results[0], x, w, bias)
        assert all(torch.equal(results[0], other) for other in results[1:]), case


ALONE = [(DTYPES[0], False, True), (DTYPES[2], False, True), (DTYPES[1], True, False)]


@pytest.mark.parametrize(("x", "exact", "transpose"), ALONE)
def test_a_row_of_matmul_does_not_depend_on_how_many_there_are(
    x: torch.dtype, exact: bool, transpose: bool
) -> None:
    case = {"bits": 4, "group_size": 32, "x": x, "scales": x, "bias": None, "n": 40, "k": 96}
    case |= {"exact": exact, "transpose": transpose}
    runner = Runner(compile_kernels([kernel(case | {"tile": tile}) for tile in ROWS]))
    rows, w, _ = operands(case | {"rows": 70})
    whole = run(runner, case, rows, w, None)
    for count in (1, 9, 16, 17, 32, 33, 64):
        assert torch.equal(run(runner, case, rows[:count].clone(), w, None), whole[:count]), count
