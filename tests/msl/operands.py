"""Random operands of the kernel tests, and the bounds that products are held to."""

import math

import numpy as np
import torch
from torch import Tensor

from torch_q4metal import ops

from .pairwise import Choice

N_SIZES = (1, 7, 8, 9, 100)
K_SIZES = (32, 64, 96, 576, 896, 3584, 4864, 18944)

Packed = tuple[Tensor, Tensor, Tensor]

# Relative error of one rounding to a dtype.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Of a float32 sum, in units of the sum of the magnitudes of what is added. A lane adds at most 37
# times four numbers in a row (K = 18944), a tile at most 18944; errors add up as their root.
SUM_ERROR = 4e-7


def random_packed(case: Choice) -> Packed:
    """weight [N, K * bits / 32] of random bits, with scales and biases of a normal size."""
    n, groups = case["n"], case["k"] // case["group_size"]
    weight = torch.randint(
        -(2**31), 2**31, (n, case["k"] * case["bits"] // 32), dtype=torch.int64
    ).to(torch.int32)
    step = 0.1 / 2 ** case["bits"]
    scales = step * (torch.rand(n, groups) + 0.5) * torch.randn(n, groups).sign()
    biases = -scales * 2 ** (case["bits"] - 1) * (1 + 0.1 * torch.randn(n, groups))
    return weight, scales.to(case["scales"]), biases.to(case["scales"])


def random_x(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers, one in a hundred of them fifty times as large, as activations are."""
    x = torch.randn(rows, columns)
    return torch.where(torch.rand(rows, columns) < 0.01, 50 * x, x).to(dtype)


def vector(size: int, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else torch.randn(size).to(dtype)


def codes_of(weight: Tensor, bits: int) -> Tensor:
    """The codes [N, K] of a bit stream, by a way of their own."""
    stream = np.unpackbits(weight.numpy().view(np.uint8), axis=1, bitorder="little")
    single = torch.from_numpy(stream).reshape(len(stream), -1, bits)
    return (single << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.float64)


def assert_products(
    y: Tensor,
    x: Tensor,
    w: Packed,
    bias: Tensor | None,
    case: Choice,
    transpose: bool = True,
    tile: torch.dtype = torch.float32,
) -> None:
    """y is x W^T + bias up to the roundings that its kernel makes, and the CPU's operator agrees.

    ``tile``: the dtype that W was rounded to before it was multiplied.
    """
    weight, scales, biases = w
    parts = codes_of(weight, case["bits"]).reshape(*scales.shape, -1) * scales.double()[..., None]
    offsets = biases.double()[..., None]
    offset = torch.zeros(1, dtype=torch.float64) if bias is None else bias.double()

    def product(factor: Tensor, dense: Tensor, offset: Tensor) -> Tensor:
        dense = dense.reshape(len(weight), -1)
        return factor @ (dense.T if transpose else dense) + offset

    exact = product(x.double(), parts + offsets, offset)
    # s q and b are added separately, so the magnitudes of both count.
    total = product(x.double().abs(), parts.abs() + offsets.abs(), offset.abs())
    rounding = (UNIT[tile] if tile != torch.float32 else 0.0) + SUM_ERROR
    bound = UNIT[y.dtype] * exact.abs() + rounding * total
    assert y.dtype == torch.promote_types(x.dtype, scales.dtype), case
    assert ((y.double() - exact).abs() <= bound).all(), (case, _worst(y, exact, bound))
    numbers = {"group_size": case["group_size"], "bits": case["bits"], "transpose": transpose}
    cpu = ops.matmul(x, *w, bias, precision="exact", **numbers)
    assert cpu.dtype == y.dtype
    assert ((y.double() - cpu.double()).abs() <= 2 * bound).all(), (case, _worst(y, cpu, bound))


def _worst(y: Tensor, expected: Tensor, bound: Tensor) -> str:
    ratio = ((y.double() - expected.double()).abs() / bound).nan_to_num(math.inf)
    return f"error {float(ratio.max()):.2g} times the bound"
