"""torch.ops.q4metal against the float64 reference, over formats, dtypes and shapes.

test_instruction_sets.py runs this file once per instruction set that the CPU has.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_q4metal import ops, reference

FORMATS = list(itertools.product(reference.BITS, reference.GROUP_SIZES))
PRECISIONS = ("exact", "fast", "int8")
EXACT = {"precision": "exact"}


def packed(rows, columns, group_size, bits, dtype=torch.float32):
    return reference.quantize(torch.randn(rows, columns).to(dtype), group_size, bits)


def bound_of(precision, rows):
    """Of the relative rms error against float64."""
    if precision == "fast":
        return 1e-4 if rows <= 8 else 3e-3
    return {"exact": 1e-6, "int8": 3e-2}[precision]


def relative_rms(result, expected):
    difference = (result.double() - expected).pow(2).mean().sqrt()
    return (difference / expected.pow(2).mean().sqrt()).item()


def rounding(dtype):
    """Relative rms that rounding the result to `dtype` alone may add."""
    return {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_matmul_is_exact_over_formats(bits, group_size):
    columns = {32: 96, 64: 192, 128: 384}[group_size]
    for dtype, rows, out_features in [
        (torch.float32, 1, 65),
        (torch.float16, 2, 17),
        (torch.bfloat16, 3, 37),
        (torch.float32, 9, 52),
        (torch.bfloat16, 33, 8),
    ]:
        w = packed(out_features, columns, group_size, bits, dtype)
        bias = torch.randn(out_features)
        x = torch.randn(rows, columns)
        for precision in PRECISIONS:
            y = ops.matmul(x, *w, bias, True, group_size, bits, "affine", precision)
            assert y.dtype == torch.float32
            expected = reference.matmul(x, *w, bias, True, group_size, bits)
            assert relative_rms(y, expected) < bound_of(precision, rows)
        back = torch.randn(rows, out_features)
        y = ops.matmul(back, *w, None, False, group_size, bits)
        expected = reference.matmul(back, *w, None, False, group_size, bits)
        assert relative_rms(y, expected) < bound_of("exact", 1)


@pytest.mark.parametrize("columns", [32, 64, 96, 576, 896, 1536, 4864, 18944])
def test_matmul_is_exact_over_columns(columns):
    for bits in (4, 8, 3):
        w = packed(17, columns, 32, bits, torch.bfloat16)
        for rows in (1, 2, 8, 9):
            x = torch.randn(rows, columns)
            expected = reference.matmul(x, *w, None, True, 32, bits)
            for precision in PRECISIONS:
                y = ops.matmul(x, *w, None, True, 32, bits, precision=precision)
                assert relative_rms(y, expected) < bound_of(precision, rows)


def test_transposed_matmul_is_exact_for_many_rows_of_w():
    w = packed(4099, 192, 64, 4)
    for rows in (1, 3, 9):
        x = torch.randn(rows, 4099)
        y = ops.matmul(x, *w, None, False)
        assert relative_rms(y, reference.matmul(x, *w, None, False)) < bound_of("exact", 1)


@pytest.mark.parametrize("x_dtype", reference.FLOAT_DTYPES)
@pytest.mark.parametrize("scales_dtype", reference.FLOAT_DTYPES)
def test_result_dtype_is_promoted_and_rounded_once(x_dtype, scales_dtype):
    w = packed(24, 128, 64, 4, scales_dtype)
    bias = torch.randn(24).to(torch.bfloat16)
    x = torch.randn(5, 128).to(x_dtype)
    expected = reference.matmul(x, *w, bias)
    for precision in PRECISIONS:
        y = ops.matmul(x, *w, bias, precision=precision)
        assert y.dtype == torch.promote_types(x_dtype, scales_dtype)
        assert relative_rms(y, expected) < bound_of(precision, 5) + rounding(y.dtype)
        assert torch.equal(ops.matvec(x[0], *w, bias, precision=precision), y[0])


def test_scales_and_biases_of_two_dtypes():
    weight, scales, biases = packed(8, 64, 64, 4, torch.float16)
    y = ops.matmul(torch.randn(2, 64).half(), weight, scales, biases.to(torch.bfloat16))
    assert y.dtype == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_does_not_depend_on_its_neighbours(precision):
    for bits, group_size in [(4, 32), (4, 64), (8, 64), (3, 128)]:
        w = packed(75, 640, group_size, bits, torch.bfloat16)
        x = torch.randn(70, 640)

        def product(rows, w=w, bits=bits, group_size=group_size):
            return ops.matmul(rows, *w, None, True, group_size, bits, "affine", precision)

        alone = torch.cat([product(row) for row in x[:8].split(1)])
        for rows in range(1, 9):
            assert torch.equal(product(x[:rows]), alone[:rows])
        many = product(x)
        for rows in (9, 10, 11, 33):
            assert torch.equal(product(x[:rows]), many[:rows])


def test_result_does_not_depend_on_threads():
    w = packed(333, 512, 64, 4)
    threads = torch.get_num_threads()
    try:
        results = {}
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results[count] = [ops.matmul(torch.ones(rows, 512), *w) for rows in (1, 5, 40)]
    finally:
        torch.set_num_threads(threads)
    for count in (2, 3, 7):
        assert all(torch.equal(a, b) for a, b in zip(results[1], results[count], strict=True))


def test_leading_shapes_strides_and_no_rows():
    w = packed(20, 96, 32, 4)
    x = torch.randn(2, 3, 4, 96)
    y = ops.matmul(x, *w, None, True, 32)
    assert y.shape == (2, 3, 4, 20)
    assert torch.equal(ops.matmul(x.transpose(0, 2), *w, None, True, 32), y.transpose(0, 2))
    strided = torch.randn(7, 192)[:, ::2]
    assert torch.equal(
        ops.matmul(strided, *w, None, True, 32),
        ops.matmul(strided.contiguous(), *w, None, True, 32),
    )
    assert ops.matmul(torch.empty(0, 96), *w, torch.ones(20), True, 32).shape == (0, 20)
    assert ops.matmul(torch.empty(3, 0, 20), *w, None, False, 32).shape == (3, 0, 96)
    wide = [torch.randn_like(t.float()).to(t.dtype) if t.is_floating_point() else t for t in w]
    sliced = [torch.cat([t, t], 1)[:, : t.shape[1]] for t in wide]  # not contiguous
    assert torch.equal(ops.matmul(x, *sliced, None, True, 32), ops.matmul(x, *wide, None, True, 32))


def test_uint32_weights_give_the_same():
    weight, scales, biases = packed(8, 64, 64, 4)
    x = torch.randn(3, 64)
    assert torch.equal(
        ops.matmul(x, weight.view(torch.uint32), scales, biases),
        ops.matmul(x, weight, scales, biases),
    )


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_quantize_dequantize_and_embedding_equal_the_reference(bits, group_size):
    for dtype in reference.FLOAT_DTYPES:
        w = torch.randn(13, 384).to(dtype)
        expected = reference.quantize(w, group_size, bits)
        result = ops.quantize(w, group_size, bits)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
        for out in (None, *reference.FLOAT_DTYPES):
            dense = reference.dequantize(*expected, group_size, bits, out)
            assert torch.equal(ops.dequantize(*result, group_size, bits, dtype=out), dense)
            ids = torch.tensor([[3, 12], [0, 3]])
            rows = ops.embedding(ids, *result, group_size, bits, dtype=out)
            assert torch.equal(rows, dense[ids])
            assert torch.equal(ops.embedding(ids.int(), *result, group_size, bits, dtype=out), rows)
    assert ops.embedding(torch.empty(0, dtype=torch.int64), *result, group_size, bits).shape == (
        0,
        384,
    )


@given(
    rows=st.integers(0, 12),
    out_features=st.integers(1, 70),
    groups=st.integers(1, 9),
    group_size=st.sampled_from(reference.GROUP_SIZES),
    bits=st.sampled_from(reference.BITS),
    transpose=st.booleans(),
    dtypes=st.tuples(*[st.sampled_from(reference.FLOAT_DTYPES)] * 2),
)
def test_any_shape(rows, out_features, groups, group_size, bits, transpose, dtypes):
    w = packed(out_features, groups * group_size, group_size, bits, dtypes[0])
    x = torch.randn(rows, groups * group_size if transpose else out_features).to(dtypes[1])
    y = ops.matmul(x, *w, None, transpose, group_size, bits, **EXACT)
    expected = reference.matmul(x, *w, None, transpose, group_size, bits)
    assert y.shape == expected.shape
    if rows:
        # A single small result may cancel: the bound is against the size of what was added up.
        dense = reference.dequantize(w[0], w[1].double(), w[2].double(), group_size, bits).abs()
        size = x.double().abs() @ (dense.T if transpose else dense)
        bound = 2e-6 * size + 1.01 * rounding(y.dtype) * expected.abs() + 1e-7
        assert ((y.double() - expected).abs() <= bound).all()


def test_extreme_scales():
    w = [t.clone() for t in packed(40, 64, 64, 4)]
    x = torch.randn(2, 64)
    half = packed(40, 64, 64, 4, torch.float16)
    tiny = (half[0], torch.full_like(half[1], 6e-8), torch.full_like(half[2], -6e-8))  # subnormal
    for case in ((w[0], w[1] * 1e-30, w[2] * 1e-30), (w[0], w[1] * 1e30, w[2] * 1e30), tiny):
        expected = reference.matmul(x, *case)
        for precision in PRECISIONS:
            y = ops.matmul(x, *case, precision=precision)
            assert relative_rms(y, expected) < bound_of(precision, 2)


def test_x_of_zeros_and_of_one_spike():
    w = packed(33, 256, 64, 4)
    assert torch.equal(ops.matmul(torch.zeros(1, 256), *w), torch.zeros(1, 33))
    spike = torch.full((1, 256), 1e-3)
    spike[0, 7] = 1000.0
    expected = reference.matmul(spike, *w)
    for precision in PRECISIONS:
        y = ops.matmul(spike, *w, precision=precision)
        assert relative_rms(y, expected) < bound_of(precision, 1)


def test_nan_and_infinity_come_through():
    w = packed(9, 128, 64, 4)
    for value in (float("nan"), float("inf")):
        for rows in (1, 9):
            x = torch.ones(rows, 128)
            x[0, 5] = value
            for precision in PRECISIONS:
                assert not ops.matmul(x, *w, precision=precision)[0].isfinite().any()
