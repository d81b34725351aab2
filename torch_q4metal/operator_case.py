"""The operators that modules call, on a small model: inputs and answers of their kernels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import ops
from .known_answers import Answer, Matrix
from .model_formats import Format
from .models.base import MATVEC_ROWS
from .small_model import SmallModel

PROMPT_ROWS = (9, 17, 33)
"""One number of rows for each tile of the matmul."""
# Relative rms errors: float32 sums in another order; tiles and results in 16 bits.
SUMS = 2e-5
_PRODUCT = {torch.float32: SUMS, torch.float16: 3e-3, torch.bfloat16: 1.2e-2}
_IDS = (0, 7, 14)


class OperatorCase:
    """Products of matrices in these formats with so many rows each, and rows of the embedding.

    ``products``  of packed formats that the model has
    ``embeds``    whether the embedding is looked at, if it is packed
    """

    def __init__(
        self, model: SmallModel, products: Iterable[tuple[Format, int]], *, embeds: bool
    ) -> None:
        self._model, self._products = model, tuple(products)
        table = model.formats.table
        self._table = table if embeds and table is not None and table.bits else None
        most = max((rows for _, rows in self._products), default=0)
        columns = max(matrix.shape[1] for matrix in model.matrices.values())
        self._x = model.material.normal(most, columns).to(model.formats.dtype)
        self._ids = torch.tensor(_IDS) % model.sizes.vocabulary
        used = [part for form, _ in self._products for part in self._matrix(form).packed]
        used += [self._x] if self._products else []
        used += [] if self._table is None else [self._ids, *self._matrix(self._table).packed]
        for tensor in used:  # moved now, so that they are counted
            model.moved(tensor)

    def queue(self) -> list[tuple[Answer, Tensor]]:
        """Each answer with what the device will have given, on the device."""
        made = [self._product(self._matrix(form), rows) for form, rows in self._products]
        return made if self._table is None else [*made, self._embedded(self._table)]

    def _matrix(self, form: Format) -> Matrix:
        return next(m for (_, own), m in self._model.matrices.items() if own == form)

    def _product(self, matrix: Matrix, count: int) -> tuple[Answer, Tensor]:
        model, form = self._model, matrix.format
        dtype, columns = model.formats.dtype, matrix.shape[1]
        x, moved = (
            whole.flatten()[: count * columns].view(count, columns)
            for whole in (self._x, model.moved(self._x))
        )
        weight, scales, biases = map(model.moved, matrix.packed)
        bias = None if matrix.bias is None else model.moved(matrix.bias)
        result = torch.promote_types(dtype, form.dtype)
        name = "q4_matvec" if count <= MATVEC_ROWS else "q4_matmul"
        rows = f"{count} row{'s' * (count > 1)}"
        kernel = f"{name} ({form}, x {str(dtype).removeprefix('torch.')}, {rows})"
        product = ops.matmul(
            moved, weight, scales, biases, bias, True, form.group_size, form.bits,
            precision=model.formats.precision,
        )  # fmt: skip
        return Answer(kernel, matrix.product(x), _PRODUCT[result]), product

    def _embedded(self, table: Format) -> tuple[Answer, Tensor]:
        matrix = self._model.matrices["table", table]
        weight, scales, biases = map(self._model.moved, matrix.packed)
        rows = ops.embedding(
            self._model.moved(self._ids), weight, scales, biases, table.group_size, table.bits,
            dtype=torch.float32,
        )  # fmt: skip
        return Answer(f"q4_embedding ({table})", matrix.dense()[self._ids], SUMS), rows
