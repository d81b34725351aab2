"""MLX's affine quantization in plain PyTorch: the written specification and the tests' oracle.

Nothing here is fast and nothing here calls the extension. A packed matrix W of N rows
(out_features) and K columns (in_features) is three tensors:

* ``weight`` int32 or uint32 ``[N, K * bits / 32]``: each row is one little-endian bit stream, code
  ``k`` in bits ``[k * bits, (k + 1) * bits)``;
* ``scales`` and ``biases`` ``[N, K / group_size]``, float32, float16 or bfloat16.

``W[n, k] = scales[n, k // group_size] * code[n, k] + biases[n, k // group_size]``. The layout and
the rounding are those of ``mlx.core.quantize`` and ``mlx.core.dequantize`` on a CPU (mlx 0.32).
"""

import torch
from torch import Tensor

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes ``[N, K]``, each in ``[0, 2**bits)``, to int32 ``[N, K * bits / 32]``.

    K must be a multiple of 32, so that a row ends on a word.
    """
    rows, columns = codes.shape
    shifts = torch.arange(bits, device=codes.device)
    stream = (codes.to(torch.int64).unsqueeze(-1) >> shifts) & 1  # [N, K, bits], lowest bit first
    words = stream.reshape(rows, columns * bits // 32, 32)
    packed = (words << torch.arange(32, device=codes.device)).sum(-1)
    return packed.to(torch.int32)  # keeps the low 32 bits, the sign bit included


def unpack(weight: Tensor, bits: int, in_features: int) -> Tensor:
    """Unpack ``[N, K * bits / 32]`` int32 or uint32 words to int32 codes ``[N, K]``."""
    words = weight.view(torch.int32).to(torch.int64) & 0xFFFFFFFF  # shifts of uint32 do not exist
    first_bit = torch.arange(in_features, device=weight.device) * bits
    index, shift = first_bit // 32, first_bit % 32
    low = words[:, index] >> shift
    # A code that straddles two words takes its upper bits from the next one.
    following = words[:, (index + 1).clamp(max=words.shape[1] - 1)] << (32 - shift)
    return ((low | following) & ((1 << bits) - 1)).to(torch.int32)


def quantize(w: Tensor, group_size: int = 64, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize ``w`` ``[N, K]`` with the numbers of ``mlx.core.quantize`` on a CPU, bit for bit.

    Returns ``(weight int32 [N, K * bits / 32], scales [N, K / group_size], biases [same])``; scales
    and biases have the dtype of ``w``. All arithmetic is float32 and rounds half to even. The
    edge of the larger magnitude is met exactly, and so is zero.
    """
    rows, columns = w.shape
    groups = w.to(torch.float32).reshape(rows, columns // group_size, group_size)
    levels = float((1 << bits) - 1)
    low, high = groups.amin(-1), groups.amax(-1)
    low_dominates = low.abs() > high.abs()
    scale = ((high - low) / levels).clamp(min=1e-7)
    scale = torch.where(low_dominates, scale, -scale)
    edge = torch.where(low_dominates, low, high)
    edge_code = torch.round(edge / scale)
    exact = edge_code != 0
    scale = torch.where(exact, edge / torch.where(exact, edge_code, 1.0), scale)
    bias = torch.where(exact, edge, 0.0)
    codes = torch.round((groups - bias.unsqueeze(-1)) / scale.unsqueeze(-1)).clamp(0, levels)
    packed = pack(codes.to(torch.int32).reshape(rows, columns), bits)
    return packed, scale.to(w.dtype), bias.to(w.dtype)


def dequantize(
    weight: Tensor,
    scales: Tensor,
    biases: Tensor,
    group_size: int = 64,
    bits: int = 4,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Expand to ``[N, K]`` in ``dtype`` (None: the dtype of ``scales``).

    In the dtype of ``scales`` the product and then the sum are rounded, as ``mlx.core.dequantize``
    does on a CPU. Any other ``dtype`` is computed in float32 and rounded once.
    """
    columns = scales.shape[1] * group_size
    own = dtype is None or dtype == scales.dtype
    compute = scales.dtype if own else torch.float32
    codes = unpack(weight, bits, columns).to(compute).reshape(*scales.shape, group_size)
    scale, bias = scales.to(compute).unsqueeze(-1), biases.to(compute).unsqueeze(-1)
    dense = codes * scale + bias
    return dense.reshape(-1, columns).to(dtype or scales.dtype)


def matmul(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor,
    bias: Tensor | None = None,
    transpose: bool = True,
    group_size: int = 64,
    bits: int = 4,
) -> Tensor:
    """``x @ W.T + bias``, or ``x @ W``, in float64: what every kernel is held to."""
    dense = dequantize(weight, scales.double(), biases.double(), group_size, bits)
    y = x.double() @ (dense.T if transpose else dense)
    return y if bias is None else y + bias.double()
