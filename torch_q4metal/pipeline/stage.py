"""What every rank does with a pass: its own layers, on KV blocks that the first stage hands out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import decode
from ..cache import KVPool, Sequence
from ..models.base import MATVEC_ROWS, CausalLM
from .message import Pass, Place


class StageSequence(Sequence):
    """A text as a later stage sees it: blocks and a length, no tokens, nothing to allocate."""

    def __init__(self, pool: KVPool, block_table: list[int], length: int) -> None:
        super().__init__(pool)
        self.block_table = block_table
        self._length = length

    @property
    def length(self) -> int:
        return self._length

    def reserve(self, count: int) -> None:
        """The first stage has."""

    def __del__(self) -> None:
        """The first stage frees the blocks."""


class StageCache:
    """The KV pools and block tables of a later stage, kept up by what passes say."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._pools: dict[int, KVPool] = {}
        self._tables: dict[int, list[int]] = {}

    def follow(self, work: Pass) -> list[StageSequence]:
        """The texts of a pass, as they are before it."""
        self._forget(work.news.get("pools", ()), work.news.get("slots", ()))
        if work.pool not in self._pools:
            self._pools[work.pool] = self._model.make_pool(work.pool_tokens)
        pool = self._pools[work.pool]
        for source, target in work.copies:
            pool.hold(max(source, target))
            pool.copy_block(source, target)
        return [StageSequence(pool, self._table(pool, place), place.start) for place in work.places]

    def _table(self, pool: KVPool, place: Place) -> list[int]:
        table = self._tables.setdefault(place.slot, [])
        table[place.keep :] = place.blocks
        if place.blocks:
            pool.hold(max(place.blocks))
        return table

    def _forget(self, pools: Iterable[int], slots: Iterable[int]) -> None:
        for pool in pools:
            self._pools.pop(pool, None)
        for slot in slots:
            self._tables.pop(slot, None)


class Stage:
    """This rank's layers: through the decode plan, or through the modules.

    ``plan``  None if the model asks for modules, or has none
    """

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self.plan = decode.plan_of(model)  # once: it looks at every module

    @torch.inference_mode()
    def compute(self, work: Pass, x: Tensor, cache: list[Sequence], out: Tensor | None) -> Tensor:
        """What the layers make of a pass: of ids int64 [rows], or of the residual stream f32
        [rows, hidden_size] of the stage before.

        All are on the CPU, wherever the layers are. Returns the residual stream [rows,
        hidden_size], in ``out`` if that is given, or from the last stage logits [texts, vocab_size]
        after each text's last row, if anybody wants them. The sequences do not count the rows yet.
        """
        model = self._model
        counts = [place.count for place in work.places]
        wants_logits = model.part.has_head and work.wants_result
        if work.planned:
            assert self.plan is not None, "rank 0 has one, and all have the same settings"
            if out is None:
                kept = work.rows if work.rows <= MATVEC_ROWS else int(work.wants_result)
                out = torch.empty(kept, model.config.vocab_size)
            length = work.places[0].length if len(counts) == 1 else 0
            self.plan.advance(x, cache, counts, out, length)
            return decode.last_rows(out, counts) if wants_logits else out
        length = max(place.length for place in work.places)
        hidden = model.advance(x.view(len(counts), counts[0], *x.shape[1:]), cache, length)
        if wants_logits:
            return model.logits(hidden[:, -1:])[:, -1].cpu()
        rows = hidden.flatten(0, 1)
        return rows.cpu() if out is None else out.copy_(rows)
