"""The rows of a pass, as a decode plan takes them: ids, positions, cosines and sines, blocks.

Right after a pass, which has driven everything else out of the caches, a torch call takes 10 to
20 us. So the inputs of a few rows are filled in place, without any.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as List

import torch
from torch import Tensor

from .cache import BLOCK, Sequence
from .models.rope import RopeConfig

_KEPT_BLOCKS = 64  # whose cosines and sines are kept: 1 MB for heads of 64


class RowInputs:
    """Inputs of R rows, 1 to 8; the tensors change with the next ``fill``.

    ids        int64 [R], of a plan that embeds: what ``write_ids`` wrote
    next_ids   int64 [R], room for the ids that a plan with a head chooses; ``read_next_ids``
    positions  int64 [R]
    rope       f32 [R, 2, head_dim], cosines and signed sines
    tables     int32 [R, blocks]: each row's blocks in the order of positions
    """

    def __init__(self, rope: RopeRows) -> None:
        self._rope_rows = rope
        self._shape = (0, 0)
        self._resize(1, 1)

    def fill(self, cache: List[Sequence], counts: List[int], length: int = 0) -> None:
        """For the next so many rows of each sequence; ``length`` as for ``DecodePlan.advance``."""
        rows, blocks = sum(counts), max(len(sequence.block_table) for sequence in cache)
        if (rows, blocks) != self._shape:
            self._resize(rows, blocks)
        size, row = self._rope_rows.bytes_a_row, 0
        for sequence, count in zip(cache, counts, strict=True):
            table, start = array("i", sequence.block_table), sequence.length
            longest = max(start + count, length)
            for position in range(start, start + count):
                self._position_memory[row] = position
                self._rope_memory[row * size : (row + 1) * size] = self._rope_rows.of(
                    position, longest
                )
                begin = row * blocks
                self._table_memory[begin : begin + len(table)] = table
                row += 1

    def write_ids(self, ids: List[List[int]]) -> None:
        """The rows' token ids, [B][L], once ``fill`` has made room for them."""
        row = 0
        for tokens in ids:
            for token in tokens:
                self._id_memory[row] = token
                row += 1

    def read_next_ids(self) -> list[int]:
        return self._next_id_memory.tolist()

    def _resize(self, rows: int, blocks: int) -> None:
        self._shape = rows, blocks
        self.ids, self.next_ids = torch.zeros(2, rows, dtype=torch.int64)
        self.positions = torch.zeros(rows, dtype=torch.int64)
        self.rope = torch.zeros(rows, 2, self._rope_rows.head_dim)
        self.tables = torch.zeros(rows, blocks, dtype=torch.int32)
        self._id_memory, self._next_id_memory = _memory(self.ids), _memory(self.next_ids)
        self._position_memory = _memory(self.positions)
        self._rope_memory = _memory(self.rope).cast("B")
        self._table_memory = _memory(self.tables.view(-1))


class RopeRows:
    """Cosines and signed sines of single positions, worked out for 32 of them at a time."""

    def __init__(self, rope: RopeConfig) -> None:
        self._rope = rope
        self.head_dim = rope.head_dim
        self.bytes_a_row = 2 * rope.head_dim * 4
        self._blocks: dict[int, memoryview] = {}

    def of(self, position: int, length: int) -> memoryview:
        """The bytes of f32 [2, head_dim]; ``length``: positions of the whole text."""
        if self._rope.depends_on(length):
            return self._rows(position, 1, length)
        number, offset = divmod(position, BLOCK)
        block = self._blocks.get(number)
        if block is None:
            if len(self._blocks) >= _KEPT_BLOCKS:
                self._blocks.clear()
            block = self._blocks[number] = self._rows(number * BLOCK, BLOCK, length)
        return block[offset * self.bytes_a_row : (offset + 1) * self.bytes_a_row]

    def _rows(self, start: int, count: int, length: int) -> memoryview:
        return _memory(torch.stack(self._rope.rows(start, count, length), 1)).cast("B")


def _memory(tensor: Tensor) -> memoryview:
    memory: memoryview = tensor.numpy().data
    return memory
