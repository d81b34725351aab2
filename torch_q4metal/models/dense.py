"""Matrices that a checkpoint left dense: kept in their own dtype, computed in f32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import MATVEC_ROWS

_BLOCK_BYTES = 16 << 20


class DenseLinear(nn.Linear):
    """A matrix that the checkpoint left dense: kept in its own dtype, computed in f32.

    Converted block by block, never as a whole: a dense 16-bit head of a 7B model would take 2 GB.
    Up to 8 rows each is a product of its own, so that its numbers do not depend on the others.
    """

    def forward(self, x: Tensor) -> Tensor:
        out = _dense_product(x.float().flatten(0, -2), self.weight)
        if self.bias is not None:
            out = out + self.bias.float()
        return out.to(x.dtype).unflatten(0, x.shape[:-1])


class DenseEmbedding(nn.Embedding):
    """A dense embedding table: rows in f32, and the head of tied models."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).float()

    def as_linear(self, x: Tensor) -> Tensor:
        return _dense_product(x.float().flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


_IN_F32: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: DenseLinear,
    nn.Embedding: DenseEmbedding,
}


def compute_dense_in_f32(module: nn.Module) -> None:
    """Puts DenseLinear and DenseEmbedding in the place of what ``load_packed`` left dense."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if (kind := _IN_F32.get(type(child))) is not None:
                dense = kind.__new__(kind)
                dense.__dict__ = child.__dict__  # the same parameters
                setattr(parent, name, dense)


def _dense_product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [M, K] f32 times weight [N, K] of any dtype, transposed: [M, N] f32."""
    block = weight.shape[0]
    if weight.dtype != torch.float32:
        block = max(1, _BLOCK_BYTES // (4 * weight.shape[1]))
    outs = []
    for part in weight.split(block):
        part = part.float()
        if 1 < rows.shape[0] <= MATVEC_ROWS:
            outs.append(torch.cat([F.linear(row, part) for row in rows.split(1)]))
        else:
            outs.append(F.linear(rows, part))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)
