"""The executor's Metal against numpy, in both builds and all orders: samples/language.metal."""

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .library import Library, MetalRunError, compile

SAMPLE = Path(__file__).with_name("samples") / "language.metal"
MODES = ["typed", "check"]
ORDERS = ["forward", "reverse", "shuffled"]


@cache
def compiled(mode: str) -> Library:
    return compile(SAMPLE, mode)


def to_bfloat(x: np.ndarray) -> np.ndarray:
    """The 16 bits of float32 values that bfloat holds exactly."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("mode", MODES)
def test_vectors(mode: str) -> None:
    out = np.zeros(16, np.float32)
    packed = np.arange(9, dtype=np.float16)[1:]  # 2 bytes off: packed vectors need no more
    three = np.arange(6, dtype=np.float32)
    compiled(mode).run("vectors", 1, 1, [out, packed, three])
    u = np.array([2, 1, 3, 4])
    parts = np.array([[2, 1, 3, 4], [2.5, 1.5, 3.5, 4.5], u, [-1, 2, -3, 4], [2, 1, 3.5, 4.5], u])
    expected = parts.sum(0) + packed[4:]
    assert out[:4].tolist() == expected.tolist()
    assert out[4:].tolist() == [4, 8, 1368, 1.5, 2, 1, 1, 2048, 40, 1, 4, 8]


@pytest.mark.parametrize("mode", MODES)
def test_math(mode: str) -> None:
    x = np.array([0.25, 0.5, 1.0, 1.75, 3.5], np.float32)
    out = np.zeros((5, 12), np.float32)
    compiled(mode).run("math", 5, 1, [x, out])
    a = x.astype(np.float64)
    half = np.sqrt(x.astype(np.float16).astype(np.float32)).astype(np.float16)
    away = np.floor(a + 0.5)
    expected = [
        np.exp(a), a**-0.5, np.tanh(a) + np.cos(a),
        np.clip(a, 0.5, 2) + np.minimum(a, 1) + np.maximum(a, 1) + 2 * a,
        a * a + 1 + np.floor(a) + np.ceil(a) + np.rint(a) + away + np.trunc(a), half,
        a**2 + a**0.5 + 2**a + np.log2(a) + np.log(a), 3 + 31 + 3 + 0xBC + 3 + 0 * a,
        -1 + a / 2 + (a >= 1) + np.clip(a, 0, 1) + a % 1, 1 + 0 * a,
        np.sin(a) + float(np.float16(np.e)) + np.arctan2(a, 2) + a % 0.75, 1 + 0 * a,
    ]  # fmt: skip
    np.testing.assert_allclose(out, np.stack(expected, 1), rtol=2e-6)


@pytest.mark.parametrize(("mode", "order"), [*itertools.product(MODES, ORDERS)])
def test_simdgroup_and_quad_operations(mode: str, order: str) -> None:
    x = np.random.default_rng(1).integers(0, 100, 64).astype(np.int32)
    out = np.zeros((2, 32, 24), np.int32)
    compiled(mode).run("simd", 1, 64, [x, out], order=order, seed=5)
    lane = np.arange(32)
    for v, o in zip(x.reshape(2, 32), out):
        quads = v.reshape(8, 4)
        first = np.eye(1, 32, dtype=int)[0]
        expected = {
            0: v.sum(), 1: v.max(), 2: v.min(),
            3: np.multiply.reduce((v % 3 + 1).astype(np.int32), dtype=np.int32),
            4: v[::-1], 5: v[lane ^ 5], 7: np.concatenate([[-1] * 3, v[:-3]]), 8: v[9] + v[0],
            9: v.cumsum(), 10: v.cumsum() - v, 11: 1 + 2 * int(v.max() > 90) + 4 * first,
            12: int(((v > 50)[:16] << np.arange(16)).sum()), 13: quads.sum(1).repeat(4),
            14: v[lane ^ 1], 15: quads[:, 2].repeat(4), 16: np.roll(v, -5),
            17: np.bitwise_and.reduce(v | 3) + np.bitwise_or.reduce(v & 12)
            + np.bitwise_xor.reduce(v),
            18: v.sum(), 19: 2, 20: 32, 21: v, 22: quads.max(1).repeat(4), 23: np.roll(v, 5),
        }  # fmt: skip
        for column, values in expected.items():
            assert (o[:, column] == values).all(), column
        assert (o[:28, 6] == v[4:]).all()


@pytest.mark.parametrize(("mode", "order"), [*itertools.product(MODES, ORDERS)])
@pytest.mark.parametrize("kind", ["float", "half", "bfloat"])
def test_simdgroup_matrices(mode: str, order: str, kind: str) -> None:
    random = np.random.default_rng(2)
    a, b = random.integers(-4, 5, (9, 16)), random.integers(-4, 5, (8, 8))
    kinds = {"float": np.float32, "half": np.float16}
    buffers = [x.astype(kinds[kind]) if kind in kinds else to_bfloat(x) for x in (a, b)]
    out = np.zeros(64 + 128, np.float32)
    compiled(mode).run(f"matrices_{kind}", 1, 32, [*buffers, out], order=order)
    used = a[1:9, 8:16]
    assert (out[:64].reshape(8, 8) == used @ b.T + 2).all()
    assert (out[64:].reshape(8, 16)[:, 8:] == used.T).all()
    assert (out[64:].reshape(8, 16)[:, :8] == 0).all()


@pytest.mark.parametrize(("mode", "order"), [*itertools.product(MODES, ORDERS)])
def test_positions_in_a_grid_that_threadgroups_do_not_divide(mode: str, order: str) -> None:
    threads, group = (5, 3, 2), (2, 2, 1)
    out = np.zeros((2, 3, 5, 22), np.uint32)
    compiled(mode).run("positions", None, group, [out], threads=threads, order=order, seed=1)
    for z, y, x in np.ndindex(2, 3, 5):
        at = np.array([x, y, z])
        in_group = at % group
        size = np.minimum(group, np.array(threads) - at // group * group)
        index = (in_group[2] * size[1] + in_group[1]) * size[0] + in_group[0]
        expected = [*at, *at // group, *in_group, 3, 2, 2, *threads, *size, *group, index]
        assert out[z, y, x].tolist() == expected


@pytest.mark.parametrize(("mode", "order"), [*itertools.product(MODES, ORDERS)])
def test_threadgroup_argument(mode: str, order: str) -> None:
    x, out = np.arange(64, dtype=np.float32), np.zeros(1, np.float32)
    done = compiled(mode).run("shared_sum", 1, 64, [x, out], threadgroup_bytes=[256], order=order)
    assert out[0] == x.sum()
    assert done.threadgroup_memory == 256
    assert done.barriers == 64 * 7


@pytest.mark.parametrize("mode", MODES)
def test_function_constants(mode: str) -> None:
    out, bias = np.zeros(4, np.float32), np.array([9], np.float32)
    values: dict[int | str, Any] = {"kWidth": np.uint32(64), 1: True}
    compiled(mode).run("constants", 1, 1, {0: out, "factor": 0.25}, constants=values)
    assert out.tolist() == [64, 0.25, -1, 129.5]
    values |= {"kHasBias": True, "kScaled": False}
    del values[1]
    buffers: dict[int | str, Any] = {"out": out, "bias": bias, "factor": 0.25}
    compiled(mode).run("constants", 1, 1, buffers, constants=values)
    assert out.tolist() == [64, 1, 9, 129.5]
    message = r"^constants: function constant 1 'kScaled' is not set$"
    with pytest.raises(MetalRunError, match=message):
        compiled(mode).run("constants", 1, 1, buffers, constants={0: np.uint32(1)})
    with pytest.raises(MetalRunError, match="function constant 0 'kWidth' has 4 bytes, got 8"):
        compiled(mode).run("constants", 1, 1, buffers, constants={0: np.uint64(1), 1: True})


@pytest.mark.parametrize("mode", MODES)
def test_orders_differ(mode: str) -> None:
    last = {}
    for order, seed in [("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)]:
        out = np.zeros(3, np.uint32)
        compiled(mode).run("last", 4, 64, [out], order=order, seed=seed)
        assert out[1:].tolist() == [256, 255]
        last[order, seed] = int(out[0])
    assert last["forward", 0] == 255
    assert last["reverse", 0] == 0
    assert len(set(last.values())) == 4


def test_threadgroup_memory_starts_as_nan() -> None:
    out = np.zeros(1, np.float32)
    compiled("typed").run("unset", 1, 1, [out])
    assert np.isnan(out[0])
    with pytest.raises(MetalRunError, match=r"never written: .* of threadgroup 'never'"):
        compiled("check").run("unset", 1, 1, [out])
