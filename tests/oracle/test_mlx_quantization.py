"""quantize, packing and dequantize against MLX itself, bit for bit."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
import torch

from torch_q4metal import ops, reference

MLX_DTYPE = {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}


def edge_rows(columns, dtype):
    """Random rows of several magnitudes, then the rows that trip quantizers."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(24, columns, generator=generator)
    rows *= torch.tensor([1e-3, 0.02, 1.0, 30.0]).repeat(6).unsqueeze(1)
    rows[0] = 0
    rows[1] = 0.25
    rows[2] = -0.5
    rows[3] = 1e-9
    rows[4] = rows[4].abs()
    rows[5] = -rows[5].abs()
    rows[6] = (rows[6] * 4).round() / 4  # exact ties
    rows[7, ::2] = -rows[7, 1::2]  # both edges of one magnitude
    return rows.to(dtype)


def to_mlx(tensor):
    return mx.array(tensor.float().numpy()).astype(MLX_DTYPE[tensor.dtype])


def to_numpy(array):
    return np.array(array.astype(mx.float32))


@pytest.mark.parametrize("dtype", MLX_DTYPE)
@pytest.mark.parametrize(
    ("bits", "group_size"), list(itertools.product(reference.BITS, reference.GROUP_SIZES))
)
def test_bit_for_bit(bits, group_size, dtype):
    w = edge_rows(384, dtype)
    expected = mx.quantize(to_mlx(w), group_size=group_size, bits=bits)
    dense = to_numpy(mx.dequantize(*expected, group_size=group_size, bits=bits))
    for implementation in (ops, reference):
        weight, scales, biases = implementation.quantize(w, group_size, bits)
        np.testing.assert_array_equal(weight.numpy(), np.array(expected[0]).view(np.int32))
        np.testing.assert_array_equal(scales.float().numpy(), to_numpy(expected[1]))
        np.testing.assert_array_equal(biases.float().numpy(), to_numpy(expected[2]))
        result = implementation.dequantize(weight, scales, biases, group_size, bits)
        assert result.dtype == dtype
        np.testing.assert_array_equal(result.float().numpy(), dense)


def test_known_words():
    """Words that mx.quantize of mlx 0.32.4 printed for w[k] = (k - 10) / 8, written down once."""
    w = ((torch.arange(32) - 10) / 8).reshape(1, 32)
    words = {
        4: [0xBCCDDEEF, 0x8899AAAB, 0x44556677, 0x00112233],
        3: [0x6DDB6FFF, 0x36DC925B, 0x00124A49],
        2: [0xAAAAABFF, 0x00055555],
    }
    scales = {4: -0.26249998807907104, 3: -0.52499998, 2: -1.3125}
    for bits, expected in words.items():
        for sign in (1, -1):
            weight, scale, bias = ops.quantize(sign * w, 32, bits)
            assert [int(word) & 0xFFFFFFFF for word in weight[0]] == expected
            assert scale.item() == pytest.approx(sign * scales[bits], rel=1e-7)
            assert bias.item() == sign * 2.625


@pytest.mark.parametrize("x_dtype", MLX_DTYPE)
@pytest.mark.parametrize("scales_dtype", MLX_DTYPE)
def test_result_dtype_is_mlx_s(x_dtype, scales_dtype):
    w = edge_rows(128, scales_dtype)
    x = torch.randn(2, 128).to(x_dtype)
    theirs = mx.quantized_matmul(
        to_mlx(x), *mx.quantize(to_mlx(w), group_size=64, bits=4), group_size=64, bits=4
    )
    ours = ops.matmul(x, *ops.quantize(w, 64, 4))
    assert MLX_DTYPE[ours.dtype] == theirs.dtype
    difference = np.abs(ours.float().numpy() - to_numpy(theirs)).max()
    assert (
        difference <= 2e-2 * np.abs(to_numpy(theirs)).max()
    )  # MLX rounds more often in half precision
