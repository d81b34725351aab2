"""Each class of fault that the check build finds, planted in samples/planted.metal."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from .build import name_of
from .library import Library, MetalRunError, Run, Unwritten, compile

SAMPLE = Path(__file__).with_name("samples") / "planted.metal"
ORDERS = ["forward", "reverse", "shuffled"]


@cache
def checked() -> Library:
    return compile(SAMPLE, "check")


@cache
def typed() -> Library:
    return compile(SAMPLE, defines=["WITHOUT_FAULTS"])


def operands(rows: int, n: int, k: int) -> tuple[list[np.ndarray], np.ndarray]:
    """weight, scales, x and the product in float64."""
    random = np.random.default_rng(rows * n + k)
    codes = random.integers(0, 16, (n, k))
    scales = random.uniform(0.005, 0.02, (n, k // 64)).astype(np.float16)
    x = random.normal(0, 1, (rows, k)).astype(np.float16)
    shifts = 4 * np.arange(8, dtype=np.uint32)
    weight = (codes.astype(np.uint32).reshape(n, -1, 8) << shifts).sum(-1, dtype=np.uint32)
    product = x.astype(np.float64) @ (scales.astype(np.float64).repeat(64, 1) * codes).T
    return [weight, scales, x], product


def run(library: Library, kernel: str, rows: int, n: int, k: int, order: str) -> tuple[float, Run]:
    """The largest error relative to the largest result, and the run."""
    buffers, product = operands(rows, n, k)
    y = np.full((rows, n), np.nan, np.float16)
    shape = np.array([rows, n, k], np.uint32)
    if kernel.startswith("matvec"):
        grid, group = ((n + 7) // 8, rows), (32, 2)
    else:
        grid, group = ((n + 31) // 32, (rows + 31) // 32), (128, 1)
    done = library.run(kernel, grid, group, [*buffers, Unwritten(y), shape], order=order, seed=3)
    return float(np.abs(y - product).max() / np.abs(product).max()), done


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("library", [typed, checked])
def test_kernels_without_fault_pass(library: Callable[[], Library], order: str) -> None:
    for kernel, rows, n, k in [("matvec_0", 3, 97, 192), ("matmul_0", 33, 100, 128)]:
        error, _ = run(library(), kernel, rows, n, k, order)
        assert error < 1e-3


MATVEC = [
    (1, (1, 97, 192), "out of bounds: read of 4 bytes at byte 9312 of buffer(0) 'weight'"),
    (
        2,
        (1, 64, 128),
        "threads 0-15, 32-47 waiting in simd_sum at .*; threads 16-31, 48-63 returned",
    ),
    (
        3,
        (1, 48, 128),
        "race: write of 2 bytes at byte 6 of buffer(3) 'y'.*thread 32 wrote it with no barrier",
    ),
    (4, (1, 64, 128), "misaligned read of 8 bytes at an address that is 2 modulo 8"),
    (5, (1, 64, 128), "shift by 32"),
    (
        6,
        (1, 64, 128),
        "out of bounds: read of 2 bytes at byte 256 of buffer(1) 'scales', which has 256",
    ),
    (7, (1, 64, 128), "index 4 outside of the array"),
    (8, (1, 64, 128), "write to memory that the kernel .* declares const: .* of buffer(2) 'x'"),
    (9, (1, 64, 128), "source lane outside the simdgroup in simd_shuffle"),
    (
        10,
        (1, 64, 128),
        "read of memory that was never written: read of 2 bytes at byte 0 of buffer(3)",
    ),
    (11, (1, 64, 128), "integer division by zero"),
]
MATMUL = [
    (
        20,
        (32, 64, 128),
        "index 31 outside of the array|out of bounds: write of 2 bytes .* 'w_tile'",
    ),
    (21, (32, 64, 128), "threadgroup memory: 'y_tile' makes it 37888 bytes, the limit is 32768"),
    (22, (32, 64, 128), "misaligned write of 8 bytes"),
    (23, (40, 64, 128), "read of memory that was never written: .* threadgroup 'x_tile'"),
    (24, (32, 64, 128), "race: .* with no barrier for this memory between"),
    (25, (32, 64, 128), "race: .* with no barrier for this memory between"),
    (26, (32, 64, 128), "race: .* with no barrier for this memory between"),
    (27, (32, 64, 128), "divergent control flow: .* waiting in simdgroup_multiply_accumulate"),
    (28, (33, 64, 128), "divergent control flow: "),
    (
        29,
        (32, 64, 128),
        "race: .* of threadgroup '[xw]_tile'.* with no barrier for this memory between",
    ),
    (
        30,
        (32, 64, 128),
        "race: .* of threadgroup 'y_tile'.* with no barrier for this memory between",
    ),
    (
        31,
        (33, 64, 128),
        "out of bounds: write of 2 bytes at byte 4518 of buffer(3) 'y', which has 4224",
    ),
    (32, (33, 100, 128), "race: write of 2 bytes .* of another threadgroup wrote it"),
]


@pytest.mark.parametrize(
    ("kernel", "fault", "shape", "message"),
    [("matvec", *f) for f in MATVEC] + [("matmul", *f) for f in MATMUL],
)
def test_planted_fault_is_found_in_every_order(
    kernel: str,
    fault: int,
    shape: tuple[int, int, int],
    message: str,
    planted: Callable[[str, object], None],
) -> None:
    found = {}
    for order in ORDERS:
        with pytest.raises(MetalRunError, match=f"^{kernel}_{fault}: [^\n]*$") as error:
            run(checked(), f"{kernel}_{fault}", *shape, order)
        found[order] = str(error.value)
        assert_line(fault, found[order])
    # Which byte and thread are the first to be wrong depends on the order.
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), found["forward"])
    planted(f"harness, fault {fault}", found["forward"])


def assert_line(fault: int, message: str) -> None:
    """The message names the line that the sample marks with the fault's number, if it marks one."""
    marked = [
        i + 1
        for i, line in enumerate(SAMPLE.read_text().split("\n"))
        if re.search(rf"// (\d+ )?{fault}( \d+)?$", line)
    ]
    if marked:
        assert f"{name_of(SAMPLE)}:{marked[0]}" in message


HAND_ON = [
    (40, "race: read of 4 bytes at byte 0 of buffer(0) 'values'"),
    (41, "race: write of 4 bytes .* of another threadgroup read it"),
    (42, "out of bounds: read of 4 bytes at byte 16 of resident(0), which has 16"),
    (43, "race: write of 4 bytes at byte 0 of buffer(1) 'count'"),
    (44, "race: atomic write of 4 bytes at byte 0 of buffer(1) 'count'.* read it"),
]


def hand_on(fault: int, order: str = "forward") -> tuple[np.ndarray, np.ndarray, Run]:
    values, count = np.zeros(128, np.float32), np.zeros(1, np.uint32)
    far = np.arange(4, dtype=np.float32)
    table = np.array([far.ctypes.data], np.uint64)
    done = checked().run(
        f"hand_on_{fault}", 2, 64, [values, count, table], resident=[far], order=order
    )
    return values, count, done


@pytest.mark.parametrize(("fault", "message"), HAND_ON)
def test_planted_fault_in_device_memory_is_found(
    fault: int, message: str, planted: Callable[[str, object], None]
) -> None:
    for order in ORDERS:
        with pytest.raises(MetalRunError) as error:
            hand_on(fault, order)
        if order == "forward":
            assert_line(fault, str(error.value))
            assert re.search(message.replace("(", r"\(").replace(")", r"\)"), str(error.value))
            planted(f"harness, fault {fault}", error.value)


def test_device_barriers_atomics_and_resident_memory_pass() -> None:
    for order in ORDERS:
        values, count, done = hand_on(0, order)
        assert (values.reshape(2, 64) == np.roll(np.arange(64), -1) + 3).all()
        assert count[0] == 128
        assert done.read[3] == [(12, 16)]
        assert done.read[1] == done.written[1] == [(0, 4)]


def test_a_fault_leaves_the_library_usable() -> None:
    for _ in range(3):
        with pytest.raises(MetalRunError):
            run(checked(), "matmul_28", 33, 64, 128, "forward")
        assert run(checked(), "matmul_0", 33, 64, 128, "forward")[0] < 1e-3


def test_what_was_touched_is_known_to_the_byte() -> None:
    n, k = 97, 192
    _, done = run(checked(), "matvec_0", 2, n, k, "forward")
    assert done.read[0] == [(0, n * k // 2)]
    assert done.read[1] == [(0, n * k // 64 * 2)]
    assert done.written[3] == [(0, 2 * n * 2)]
    assert done.read[3] == done.written[0] == []
    assert done.read[4] == [(4, 12)]  # `rows` isn't looked at
    assert done.threadgroup_memory == 0
