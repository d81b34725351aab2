"""What a decode plan's steps have to compute, in float64 with PyTorch, on random packed matrices.

The answers that kernels are held to (plan_case.py, operator_case.py, device_check.py). They come
from the written specification (reference.py) and from nothing that was compiled for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .model_formats import Format

NORM_EPS = 1e-5


@dataclass(frozen=True)
class Answer:
    """What a kernel must give: at most ``bound`` away from ``expected``, as relative rms error."""

    kernel: str
    expected: Tensor
    bound: float

    def error_of(self, result: Tensor) -> float:
        """Relative rms error; of token ids, the share that is wrong."""
        if not result.is_floating_point():
            return float((result != self.expected).double().mean())
        return relative_error(result, self.expected)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what was expected."""
    expected = expected.double()
    return float((result.double() - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Matrix:
    """W ``[N, K]``: ``weight`` int32 ``[N, K * bits / 32]`` with scales and biases, or dense."""

    format: Format
    weight: Tensor
    scales: Tensor | None
    biases: Tensor | None
    bias: Tensor | None  # float32 [N], the layer's own

    @property
    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.scales is not None
        assert self.biases is not None
        return self.weight, self.scales, self.biases

    @property
    def shape(self) -> tuple[int, int]:
        if self.scales is None:
            return self.weight.shape[0], self.weight.shape[1]
        return self.scales.shape[0], self.scales.shape[1] * self.format.group_size

    def dense(self) -> Tensor:
        """The matrix in float64."""
        if self.format.bits == 0:
            return self.weight.double()
        weight, scales, biases = self.packed
        numbers = self.format.group_size, self.format.bits
        return reference.dequantize(weight, scales.double(), biases.double(), *numbers)

    def product(self, x: Tensor) -> Tensor:
        """x [..., K] W^T + bias, in float64."""
        y = x.double() @ self.dense().T
        return y if self.bias is None else y + self.bias.double()


@dataclass
class Material:
    """Random numbers that matrices are made of. Bytes of weights are shared: any are valid codes.

    ``words`` int32, ``floats`` one vector for each dtype of dense matrices.
    """

    generator: torch.Generator
    words: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    floats: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def prepare(self, sizes: dict[Format, int]) -> None:
        """Makes as much as matrices of so many elements need, at most."""
        count = max((n * f.bits // 32 for f, n in sizes.items()), default=0)
        low, high = -(1 << 31), (1 << 31) - 1
        self.words = torch.randint(low, high, (count,), generator=self.generator).int()
        for f, n in sizes.items():
            if f.bits == 0:
                self.floats[f.dtype] = self.uniform(n, -0.1, 0.1).to(f.dtype)

    def matrix(self, form: Format, rows: int, columns: int, bias: bool) -> Matrix:
        own = self.uniform(rows, -1.0, 1.0) if bias else None
        if form.bits == 0:
            weight = self.floats[form.dtype][: rows * columns].view(rows, columns)
            return Matrix(form, weight, None, None, own)
        weight = self.words[: rows * columns * form.bits // 32].view(rows, -1)
        groups = rows * columns // form.group_size
        levels = (1 << form.bits) - 1
        scales = self.uniform(groups, 0.5, 1.5) * (3.0 / levels / columns**0.5)
        biases = -scales * levels * self.uniform(groups, 0.45, 0.55)
        packed = [part.to(form.dtype).view(rows, -1) for part in (scales, biases)]
        return Matrix(form, weight, packed[0], packed[1], own)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, count: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=self.generator)

    def tensors(self) -> list[Tensor]:
        return [self.words, *self.floats.values()]


def normed(hidden: Tensor, gamma: Tensor) -> Tensor:
    """RMSNorm of hidden [R, H]."""
    h = hidden.double()
    return h * gamma.double() / (h.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def random_rope(material: Material, rows: int, head_dim: int) -> Tensor:
    """float32 [R, 2, head_dim]: cosines, and sines that are negative in the first half."""
    angles = material.uniform(rows * head_dim // 2, 0.0, 6.28).view(rows, -1)
    cosines, sines = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cosines] * 2, -1), torch.cat([-sines, sines], -1)], 1)


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    """x [R, heads * head_dim] by rope [R, 2, head_dim], in float64."""
    heads = x.double().unflatten(-1, (-1, rope.shape[-1]))
    a, b = heads.chunk(2, -1)
    turned = heads * rope[:, :1].double() + torch.cat([b, a], -1) * rope[:, 1:].double()
    return turned.flatten(1)


def attention(queries: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """queries [R, heads * head_dim] over each row's keys and values [kv_heads, positions,
    head_dim], in float64.
    """
    rows = []
    for query, key, value in zip(queries.double(), keys, values, strict=True):
        heads = query.view(key.shape[0], -1, key.shape[-1])
        weights = (heads @ key.double().transpose(1, 2) * key.shape[-1] ** -0.5).softmax(-1)
        rows.append((weights @ value.double()).flatten())
    return torch.stack(rows)
