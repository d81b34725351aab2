"""Typed wrappers of ``torch.ops.q4metal``, their shapes on the meta device, and autograd.

The schemas are in csrc/ops.cpp, argument checks in csrc/checks.h. A packed matrix W ``[N, K]`` is
``weight`` int32 or uint32 ``[N, K * bits / 32]`` with ``scales`` and ``biases`` ``[N, K /
group_size]`` in float32, float16 or bfloat16. Every function raises ValueError, in one sentence,
for shapes, dtypes or formats that do not fit together.
"""

from typing import Any

import torch
from torch import Tensor

from . import _extension

_extension.load()
_ops = torch.ops.q4metal


def matmul(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    bias: Tensor | None = None,
    transpose: bool = True,
    group_size: int = 64,
    bits: int = 4,
    mode: str = "affine",
    precision: str = "fast",
) -> Tensor:
    """``x [..., K] @ W.T + bias``, or ``x [..., N] @ W + bias`` with ``transpose=False``.

    The result has dtype promote(x, scales, biases); sums are float32. ``precision``: "exact"
    (float32 arithmetic, relative error about 5e-7), "fast" (5e-5 up to 8 rows, below 3e-3 from 9)
    or "int8" (8-bit activations, 1e-2). Differentiable with
    respect to ``x`` and ``bias``; the backward pass works on the packed weight too.
    """
    return _ops.matmul(
        x, weight, scales, biases, bias, transpose, group_size, bits, mode, precision
    )


def matvec(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 64,
    bits: int = 4,
    mode: str = "affine",
    precision: str = "fast",
) -> Tensor:
    """``W @ x + bias`` -> ``[N]`` for one ``x [K]``; otherwise as :func:`matmul`."""
    return _ops.matvec(x, weight, scales, biases, bias, group_size, bits, mode, precision)


def embedding(
    ids: Tensor,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    group_size: int = 64,
    bits: int = 4,
    mode: str = "affine",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of W for ``ids [...]`` (int64, int32) -> ``[..., K]`` in ``dtype`` (None: the scales').

    Raises IndexError for an id outside ``[0, N)``.
    """
    return _ops.embedding(ids, weight, scales, biases, group_size, bits, mode, dtype)


def dequantize(
    weight: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    group_size: int = 64,
    bits: int = 4,
    mode: str = "affine",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """W ``[N, K]`` in ``dtype`` (None: the scales', rounded as mlx.core.dequantize on a CPU)."""
    return _ops.dequantize(weight, scales, biases, group_size, bits, mode, dtype)


def quantize(
    w: Tensor, group_size: int = 64, bits: int = 4, mode: str = "affine"
) -> tuple[Tensor, Tensor, Tensor]:
    """Packs ``w [N, K]`` -> (weight int32, scales, biases), as mlx.core.quantize on a CPU does."""
    return _ops.quantize(w, group_size, bits, mode)


def decode_step(
    plan: int,
    input: Tensor,
    positions: Tensor,
    rope: Tensor,
    block_tables: Tensor,
    kv: list[Tensor],
    out: Tensor,
    sampling: Tensor | None = None,
) -> None:
    """One token for each of R rows (1 to 8) of the model behind the handle ``plan``.

    ``input`` ids int64 [R]; ``positions`` int64 [R]; ``rope`` float32 [R, 2, head_dim], cosines and
    signed sines; ``block_tables`` int32 [R, blocks]; ``kv`` the slabs [2, layers, blocks, kv_heads,
    32, head_dim], which get the new keys and values; ``out`` gets logits (float32 [R, V]) or
    ids (int64 [R]). Raises ValueError, and IndexError for ids or blocks that do not exist.

    With a plan on MPS all are MPS tensors but ``positions`` and ``sampling``, int32 [R, 6] on the
    CPU: how each row's id is drawn (csrc/metal/plan_launch.h); None takes the likeliest.
    """
    _ops.decode_step(plan, input, positions, rope, block_tables, sampling, kv, out)


def cpu_kernels() -> str:
    """Name of the CPU kernel table in use: a value of Q4METAL_CPU."""
    return _extension.load().cpu_kernels()


def read_probe(size: int, threads: int, repeats: int = 3, prefetch: bool = False) -> list[float]:
    """Seconds of each of ``repeats`` passes that read ``size`` bytes with ``threads`` threads.

    ``prefetch``: 4 KB ahead by instruction, which helps some processors and hinders others.
    """
    return _extension.load().read_probe(size, threads, repeats, prefetch)


def _require(condition: bool, sentence: str) -> None:
    # Fake kernels check only what their own arithmetic needs: csrc/checks.h checks everything.
    if not condition:
        raise ValueError(sentence)


def _require_one_device(tensor: Tensor, name: str, weight: Tensor) -> None:
    _require(
        tensor.device == weight.device,
        f"{name} is on {tensor.device} and weight on {weight.device}; both must be on one device",
    )


def _promote(x: Tensor, scales: Tensor, biases: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(x.dtype, scales.dtype)
    return dtype if biases is None else torch.promote_types(dtype, biases.dtype)


@torch.library.register_fake("q4metal::matmul")
def _(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    bias: Tensor | None = None,
    transpose: bool = True,
    group_size: int = 64,
    bits: int = 4,
    mode: str = "affine",
    precision: str = "fast",
) -> Tensor:
    _require_one_device(x, "x", weight)
    out_features, in_features = scales.shape[0], scales.shape[1] * group_size
    reduced, produced = (in_features, out_features) if transpose else (out_features, in_features)
    _require(
        x.dim() >= 1 and x.shape[-1] == reduced,
        f"x has shape {list(x.shape)}; its last dimension must be {reduced} for a packed matrix of "
        f"[{out_features}, {in_features}] with transpose={transpose}",
    )
    return x.new_empty((*x.shape[:-1], produced), dtype=_promote(x, scales, biases))


@torch.library.register_fake("q4metal::matvec")
def _(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 64,
    bits: int = 4,
    mode: str = "affine",
    precision: str = "fast",
) -> Tensor:
    _require_one_device(x, "x", weight)
    in_features = scales.shape[1] * group_size
    _require(
        x.dim() == 1 and x.shape[0] == in_features,
        f"x has shape {list(x.shape)}; matvec takes [{in_features}] here, use matmul for more rows",
    )
    return x.new_empty((scales.shape[0],), dtype=_promote(x, scales, biases))


@torch.library.register_fake("q4metal::embedding")
def _(
    ids: Tensor,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    group_size: int = 64,
    bits: int = 4,
    mode: str = "affine",
    dtype: torch.dtype | None = None,
) -> Tensor:
    _require_one_device(ids, "ids", weight)
    own = _promote(scales, scales, biases)
    return scales.new_empty((*ids.shape, scales.shape[1] * group_size), dtype=dtype or own)


@torch.library.register_fake("q4metal::dequantize")
def _(
    weight: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    group_size: int = 64,
    bits: int = 4,
    mode: str = "affine",
    dtype: torch.dtype | None = None,
) -> Tensor:
    own = _promote(scales, scales, biases)
    return scales.new_empty((scales.shape[0], scales.shape[1] * group_size), dtype=dtype or own)


@torch.library.register_fake("q4metal::quantize")
def _(
    w: Tensor, group_size: int = 64, bits: int = 4, mode: str = "affine"
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = w.shape
    _require(
        columns % group_size == 0,
        f"w has K={columns}; it must be a multiple of group_size={group_size}",
    )
    packed = w.new_empty((rows, columns * bits // 32), dtype=torch.int32)
    groups = w.new_empty((rows, columns // group_size))
    return packed, groups, torch.empty_like(groups)


@torch.library.register_fake("q4metal::decode_step")
def _(
    plan: int,
    input: Tensor,
    positions: Tensor,
    rope: Tensor,
    block_tables: Tensor,
    sampling: Tensor | None,
    kv: list[Tensor],
    out: Tensor,
) -> None:
    return None


def _save_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scales, biases, bias, transpose, *format_and_precision = inputs
    ctx.save_for_backward(weight, scales, biases)
    ctx.x_dtype, ctx.transpose, ctx.format = x.dtype, transpose, format_and_precision
    ctx.bias_dtype = None if bias is None else bias.dtype


def _matmul_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """dL/dx = g W for x W^T, and g W^T for x W: the other product of the same packed matrix."""
    weight, scales, biases = ctx.saved_tensors
    x_gradient = bias_gradient = None
    if ctx.needs_input_grad[0]:
        product = _ops.matmul(
            gradient, weight, scales, biases, None, not ctx.transpose, *ctx.format
        )
        x_gradient = product.to(ctx.x_dtype)
    if (
        ctx.bias_dtype is not None and ctx.needs_input_grad[4]
    ):  # the tuple ends before trailing defaults
        bias_gradient = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
    return x_gradient, None, None, None, bias_gradient, None, None, None, None, None


torch.library.register_autograd("q4metal::matmul", _matmul_backward, setup_context=_save_matmul)


def _save_matvec(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scales, biases, bias, *format_and_precision = inputs
    _save_matmul(ctx, (x, weight, scales, biases, bias, True, *format_and_precision), output)


def _matvec_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    gradients = _matmul_backward(ctx, gradient)
    return gradients[:5] + gradients[6:]  # matvec has no `transpose`


torch.library.register_autograd("q4metal::matvec", _matvec_backward, setup_context=_save_matvec)
