"""What every rank does with a pass: its own layers, on KV blocks that the first stage hands out."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import decode
from ..cache import KVPool, Sequence
from ..models.base import MATVEC_ROWS, CausalLM
from ..row_inputs import RowInputs
from .message import Pass, Place, head_of


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

    def follow(self, work: Pass) -> list[Sequence]:
        """The texts of a pass, as they are before it."""
        self._forget(work.news.get("pools", ()), work.news.get("slots", ()))
        if work.pool not in self._pools:
            self._pools[work.pool] = self._model.make_pool(work.pool_tokens)
        pool = self._pools[work.pool]
        for source, target in work.copies:
            pool.hold(max(source, target))
            pool.copy_block(source, target)
        for place in work.places:
            self._follow_table(pool, place)
        return self.texts(work)

    def texts(self, work: Pass) -> list[Sequence]:
        """The texts of a pass that changes no block."""
        pool = self._pools[work.pool]
        return [StageSequence(pool, self._tables[one.slot], one.start) for one in work.places]

    def _follow_table(self, pool: KVPool, place: Place) -> None:
        table = self._tables.setdefault(place.slot, [])
        table[place.keep :] = place.blocks
        if place.blocks:
            pool.hold(max(place.blocks))

    def _forget(self, pools: Iterable[int], slots: Iterable[int]) -> None:
        for pool in pools:
            self._pools.pop(pool, None)
        for slot in slots:
            self._tables.pop(slot, None)


@dataclass(frozen=True)
class Ahead:
    """A pass that has not come yet, with all that it takes but its rows.

    What decoding is likely to go on with is worked out while the other stages compute. Afterwards
    it would take some 100 us, as layers leave nothing but weights in a processor's caches.

    work    without its number            head     what its message begins with
    logits  f32 [texts, vocab_size], for the last stage to write to, and its rows
    """

    work: Pass
    head: bytes
    inputs: RowInputs
    logits: Tensor | None
    rows: list[Tensor]


class Stage:
    """This rank's layers: through the decode plan, or through the modules.

    ``plan``  None if the model asks for modules, or has none
    """

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self.plan = decode.plan_of(model)  # once: it looks at every module

    def compute(
        self,
        work: Pass,
        x: Tensor,
        cache: List[Sequence],
        out: Tensor | None,
        ahead: Ahead | None = None,
    ) -> Tensor:
        """What the layers make of a pass: of ids int64 [rows], or of the residual stream f32
        [rows, hidden_size] of the stage before.

        All are on the CPU, wherever the layers are. Returns the residual stream [rows,
        hidden_size], in ``out`` if that is given, or from the last stage logits [texts, vocab_size]
        after each text's last row, if anybody wants them. The sequences do not count the rows yet.
        ``ahead``: where the pass was looked ahead to. Called in inference mode.
        """
        if ahead is not None and self.plan is not None:
            out = ahead.logits if out is None else out
            assert out is not None, "look_ahead made it"
            self.plan.run(x, ahead.inputs, cache[0].pool.slabs, out)
            return out
        model = self._model
        counts = [place.count for place in work.places]
        wants_logits = model.part.has_head and work.wants_result
        if work.planned:
            assert self.plan is not None, "rank 0 has one, and all have the same settings"
            if out is None:
                kept = work.rows if work.rows <= MATVEC_ROWS else int(work.wants_result)
                out = torch.empty(kept, model.config.vocab_size)
            self.plan.advance(x, cache, counts, out, _length(work))
            return decode.last_rows(out, counts) if wants_logits else out
        length = max(place.length for place in work.places)
        hidden = model.advance(x.view(len(counts), counts[0], *x.shape[1:]), cache, length)
        if wants_logits:
            return model.logits(hidden[:, -1:])[:, -1].cpu()
        rows = hidden.flatten(0, 1)
        return rows.cpu() if out is None else out.copy_(rows)

    def look_ahead(self, work: Pass, cache: List[Sequence]) -> Ahead | None:
        """Prepares a pass that ``Pass.next`` gave; None without a plan.

        ``cache``: its texts, as they will be before it.
        """
        if self.plan is None:
            return None
        config, logits = self._model.config, None
        if self._model.part.has_head:
            logits = torch.empty(work.rows, config.vocab_size)
        inputs = self.plan.row_inputs()
        inputs.fill(cache, [1] * len(cache), _length(work))
        head = head_of(work, config.hidden_size)
        return Ahead(work, head, inputs, logits, [] if logits is None else list(logits))


def _length(work: Pass) -> int:
    """Positions of a pass's text once its prompt is done, if it is one text's."""
    return work.places[0].length if len(work.places) == 1 else 0
