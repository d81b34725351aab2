"""Keys and values of past tokens, in blocks of 32 positions that several sequences can share.

A ``KVPool`` owns the memory, in slabs that never move once they are allocated. A ``Sequence`` is a
list of blocks and the tokens whose keys and values lie in them; ``truncate`` forgets the newest,
``fork`` shares a prefix. A ``Window`` is what one pass over the layers reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ContextLengthError

BLOCK = 32
"""Positions in a block."""
SLAB_BLOCKS = 64
"""Blocks in a slab: 2048 positions, 117 MB for a 7B model with 4 KV heads in 16 bits."""


def blocks_for(positions: int) -> int:
    """Blocks that hold so many positions."""
    return -(-positions // BLOCK)


class KVPool:
    """Blocks of keys and values for ``max_tokens`` positions of all its sequences together.

    ``slabs`` are tensors [2, num_layers, blocks, num_kv_heads, 32, head_dim]; index 0 of the first
    dimension holds the keys, index 1 the values. Block ``b`` is row ``b % 64`` of slab ``b // 64``.
    A slab is allocated when its first block is needed.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        max_tokens: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if max_tokens < 1:
            raise ContextLengthError(f"a KV cache needs room for a token, not for {max_tokens}.")
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.max_tokens = max_tokens
        self.max_blocks = blocks_for(max_tokens)
        self.device = torch.device(device)
        self.slabs: list[Tensor] = []
        self._free: list[int] = []  # a stack, lowest block on top
        self._owners: list[int] = []  # per block: how many sequences hold it

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence holds, those of slabs to come included."""
        return self.max_blocks - len(self._owners) + len(self._free)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one position takes over all layers, keys and values."""
        per_layer = 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return self.num_layers * per_layer

    def locate(self, block: int) -> tuple[int, int]:
        """(slab, row in it) of a block."""
        return divmod(block, SLAB_BLOCKS)

    def allocate(self) -> int:
        """A block with one owner. Raises ContextLengthError when all are taken."""
        if not self._free:
            self._grow()
        block = self._free.pop()
        self._owners[block] = 1
        return block

    def hold(self, block: int) -> None:
        """Makes the memory of a block that another process has allocated, for other layers."""
        while len(self._owners) <= block:
            self._grow()

    def share(self, block: int) -> None:
        self._owners[block] += 1

    def release(self, block: int) -> None:
        self._owners[block] -= 1
        if self._owners[block] == 0:
            self._free.append(block)

    def is_shared(self, block: int) -> bool:
        return self._owners[block] > 1

    def copy_block(self, source: int, target: int) -> None:
        """Copies keys and values of one block over all layers."""
        (from_slab, from_row), (to_slab, to_row) = self.locate(source), self.locate(target)
        with torch.no_grad():
            self.slabs[to_slab][:, :, to_row].copy_(self.slabs[from_slab][:, :, from_row])

    def _grow(self) -> None:
        first = len(self._owners)
        count = min(SLAB_BLOCKS, self.max_blocks - first)
        if count <= 0:
            raise ContextLengthError(
                f"the KV cache is full: all {self.max_tokens} positions are taken; ask for a "
                "larger max_kv_size or start anew."
            )
        shape = (2, self.num_layers, count, self.num_kv_heads, BLOCK, self.head_dim)
        # A slab made under inference_mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.slabs.append(torch.empty(shape, dtype=self.dtype, device=self.device))
        self._owners += [0] * count
        self._free += reversed(range(first, first + count))


class Sequence:
    """The tokens of one text and the blocks with their keys and values.

    ``tokens`` are the token ids in the cache, oldest first. ``block_table`` lists the blocks in the
    order of positions and may hold a few more than the tokens need.
    """

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.block_table: list[int] = []
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        """Positions in use. Derived from ``tokens``, so that no interrupt can part the two."""
        return len(self.tokens)

    @property
    def room(self) -> int:
        """How many more tokens could be appended now."""
        free = self.pool.free_blocks
        spare = len(self.block_table) * BLOCK - self.length
        if self._partial_block_is_shared():
            if free == 0:
                return 0
            free -= 1
        return min(spare + free * BLOCK, self.pool.max_tokens - self.length)

    def reserve(self, count: int) -> None:
        """Makes the next ``count`` positions writable: blocks for them, none of them shared.

        Raises ContextLengthError, before anything changes, if the pool has no room for them.
        """
        if self._has_room(count):
            return
        if count > self.room:
            raise ContextLengthError(
                f"the KV cache has room for {self.room} more tokens, but {count} are needed; ask "
                "for a larger max_kv_size or start anew."
            )
        pool, table = self.pool, self.block_table
        if self._partial_block_is_shared():
            index = self.length // BLOCK
            shared, own = table[index], pool.allocate()
            pool.copy_block(shared, own)
            table[index] = own
            pool.release(shared)
        while len(table) < blocks_for(self.length + count):
            table.append(pool.allocate())

    def append(self, tokens: Iterable[int]) -> None:
        """Says that keys and values of these tokens now lie in the next positions."""
        tokens = list(tokens)
        self.reserve(len(tokens))
        self.tokens.extend(tokens)  # one call, so that an interrupt sees all of them or none

    def truncate(self, length: int) -> None:
        """Forgets all but the first ``length`` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
        del self.tokens[length:]
        while len(self.block_table) > blocks_for(length):
            self.pool.release(self.block_table.pop())

    def fork(self) -> Sequence:
        """A second sequence with the same tokens. The blocks are shared until one is written to."""
        other = Sequence(self.pool)
        for block in self.block_table[: blocks_for(self.length)]:
            self.pool.share(block)
            other.block_table.append(block)
        other.tokens.extend(self.tokens)
        return other

    def free(self) -> None:
        """Gives all blocks back. The sequence is empty and may be used again."""
        self.truncate(0)

    def __del__(self) -> None:
        for block in getattr(self, "block_table", ()):
            self.pool.release(block)

    def __repr__(self) -> str:
        return f"Sequence(length={self.length}, block_table={self.block_table})"

    def _has_room(self, count: int) -> bool:
        """Whether nothing needs to be done for so many more: what nearly every token finds."""
        end = len(self.tokens) + count
        fits = end <= len(self.block_table) * BLOCK and end <= self.pool.max_tokens
        return count == 0 or (fits and not self._partial_block_is_shared())

    def _partial_block_is_shared(self) -> bool:
        index, used = divmod(self.length, BLOCK)
        return used > 0 and self.pool.is_shared(self.block_table[index])


@dataclass(frozen=True)
class _Run:
    """Consecutive entries of a block table in one slab; ``rows`` is a slice if they adjoin."""

    slab: int
    rows: slice | list[int]
    first: int  # index in the block table
    count: int


def _runs(pool: KVPool, table: list[int]) -> Iterator[_Run]:
    first = 0
    while first < len(table):
        slab = pool.locate(table[first])[0]
        end = first + 1
        while end < len(table) and pool.locate(table[end])[0] == slab:
            end += 1
        rows = [pool.locate(block)[1] for block in table[first:end]]
        adjoining = rows[-1] - rows[0] == len(rows) - 1 and rows == sorted(rows)
        yield _Run(slab, slice(rows[0], rows[-1] + 1) if adjoining else rows, first, len(rows))
        first = end


class Window:
    """One pass over the layers for ``count`` new tokens of one sequence.

    Everything that does not depend on the layer is worked out here, once a pass: a layer then costs
    one copy a written block, and one copy a run of blocks to read (one, unless the sequence crosses
    slabs). The gathered keys and values live in one f32 buffer that all layers use in turn.
    """

    def __init__(self, sequence: Sequence, count: int) -> None:
        sequence.reserve(count)
        pool = sequence.pool
        self.start = sequence.length
        self.end = self.start + count
        self._targets = list(self._write_targets(sequence))

        table = sequence.block_table[: blocks_for(self.end)]
        heads, dim = pool.num_kv_heads, pool.head_dim
        gathered = torch.empty((2, heads, len(table), BLOCK, dim), device=pool.device)
        flat = gathered.view(2, heads, len(table) * BLOCK, dim)[:, :, : self.end]
        self._keys, self._values = flat[:1], flat[1:]
        self._sources: list[tuple[Tensor, tuple[Tensor, ...], Tensor | None]] = []
        for run in _runs(pool, table):
            # [2, heads, blocks, 32, dim] on both sides
            part = gathered[:, :, run.first : run.first + run.count].transpose(1, 2)
            slab = pool.slabs[run.slab]
            if isinstance(run.rows, slice):
                self._sources.append((part, slab[:, :, run.rows].unbind(1), None))
            else:
                rows = torch.tensor(run.rows, device=pool.device)
                self._sources.append((part, slab.unbind(1), rows))

    def update(self, layer: int, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values of a layer and returns all of them.

        keys_values: [2, count, num_kv_heads, head_dim], rounded to the pool's dtype.
        Returns keys and values [1, num_kv_heads, length + count, head_dim] in f32, which hold until
        the next call.
        """
        for low, high, targets in self._targets:
            targets[layer].copy_(keys_values[:, low:high])
        for part, sources, rows in self._sources:
            source = sources[layer]
            part.copy_(source if rows is None else source.index_select(1, rows))
        return self._keys, self._values

    def _write_targets(self, sequence: Sequence) -> Iterator[tuple[int, int, tuple[Tensor, ...]]]:
        """(first new token, last + 1, a view [2, tokens, heads, dim] for every layer) a block."""
        pool = sequence.pool
        position = self.start
        while position < self.end:
            index, offset = divmod(position, BLOCK)
            size = min(BLOCK - offset, self.end - position)
            slab, row = pool.locate(sequence.block_table[index])
            view = pool.slabs[slab][:, :, row, :, offset : offset + size].transpose(2, 3)
            low = position - self.start
            yield low, low + size, view.unbind(1)
            position += size
