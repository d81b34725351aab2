"""Rank 0: computes its own layers of every pass, sends it round, and takes back what was drawn."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..cache import KVPool, Sequence
from ..errors import PipelineError
from ..models.base import MATVEC_ROWS, PREFILL_CHUNK, CausalLM
from ..text import Text
from .interrupts import Deferral
from .message import Kind, Message, Pass, Place, Want, pass_bytes, result_bytes
from .stage import Ahead, Stage
from .transport import Transport
from .worker import RESULTS, Inbox, Outbox


class LeadPool(KVPool):
    """Rank 0's KV pool. Remembers copied blocks until the other stages are told."""

    numbers = itertools.count()

    def __init__(self, *shape: Any) -> None:
        super().__init__(*shape)
        self.number = next(LeadPool.numbers)
        self.copies: list[tuple[int, int]] = []

    def copy_block(self, source: int, target: int) -> None:
        super().copy_block(source, target)
        self.copies.append((source, target))


class Driver:
    """The ``Engine`` of rank 0's model, which it makes its own.

    Passes arrive at every stage in the order in which they were sent, so all keep the same KV
    blocks without being asked. A pass that was sent is computed, whatever interrupts rank 0.

    ``stages``    what each rank has loaded: "rank", "host", "layers", "weight_bytes", and whether
                  its decode plan "reads_prompts"
    ``on_close``  called once all ranks have ended
    """

    def __init__(
        self,
        transport: Transport,
        model: CausalLM,
        stages: list[dict[str, Any]],
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        config = model.config
        self.groups = transport.world_size
        self.stages = stages
        # As in one process: if any layer cannot, all prompts go through modules.
        self._reads_prompts = all(stage["reads_prompts"] for stage in stages)
        self._on_close = on_close
        self._model = model
        self._stage = Stage(model)
        self._inference_mode = torch.inference_mode()  # made once: as a decorator it takes longer
        self._hidden_size = config.hidden_size
        self._vocab_size = config.vocab_size
        self._outbox = Outbox(transport, pass_bytes(config.hidden_size, model.max_kv_size))
        self._inbox = Inbox(transport, result_bytes(config.vocab_size), RESULTS)
        self._read: Message | None = None  # a result that was read; its buffer waits to be reused
        self._under_way: deque[int] = deque()  # passes whose results have not been taken
        self._numbers = itertools.count()
        self._slots: weakref.WeakKeyDictionary[Sequence, _Slot] = weakref.WeakKeyDictionary()
        self._pools: weakref.WeakSet[LeadPool] = weakref.WeakSet()
        self._texts: set[int] = set()  # those that are alive
        self._results: dict[int, tuple[int, Tensor | None]] = {}
        self._known: set[int] = set()  # texts that the last stage draws for
        self._gone: dict[str, list[int]] = {"pools": [], "slots": [], "texts_gone": []}
        self._is_over = False
        model.engine = self
        model.pool_class = LeadPool

    # ---- Engine

    def submit(self, texts: list[Text]) -> None:
        """As ``Engine.submit``. Returns when this stage is done; the others go on."""
        for text in texts:
            self._model.check_context(len(text.tokens))
            text.cache.reserve(len(text.waiting))
        lane = texts[0].lane
        if isinstance(lane, _Lane) and self._continues(lane, texts):
            lane.take(texts)
            self._send(lane.ahead.work, lane.x, texts, lane.ids, lane.ahead)
            return
        counts = {len(text.waiting) for text in texts}
        rows = sum(len(text.waiting) for text in texts)
        pools = {id(text.cache.pool) for text in texts}
        has_plan = self._stage.plan is not None
        together = rows <= MATVEC_ROWS and len(pools) == 1 and (has_plan or len(counts) == 1)
        if len(texts) > 1 and not (together and all(_want(t) is Want.TOKEN for t in texts)):
            for text in texts:
                self.submit([text])
        elif rows <= MATVEC_ROWS:
            self._pass(texts, None, planned=has_plan)
        else:
            self._prefill(texts[0])

    def draw(self, text: Text) -> tuple[int, Tensor | None]:
        """As ``Engine.draw``. Waits for the last stage."""
        while text.number not in self._results:
            if not self._under_way:
                raise PipelineError("the text's last pass was interrupted; submit it again.")
            self._take_result()
        token, numbers = self._results.pop(text.number)
        if text.sampling is None:
            assert numbers is not None
            return text.choice.draw(text.tokens, numbers)
        return token, numbers

    def close(self) -> None:
        """Ends all other ranks, once they have done what is under way."""
        if self._is_over:
            return
        with Deferral():
            while self._under_way:
                self._take_result()
            self._is_over = True  # a link that fails from here on has been told
            self._reuse()
            self._outbox.send_end({"end": True}, 1)
            self._inbox.drain()
            self._on_close()

    # ---- passes

    def _prefill(self, text: Text) -> None:
        """A prompt, in the chunks that one process would take."""
        end = len(text.tokens)
        while (start := text.cache.length) < end:
            chunk = min(end, start + PREFILL_CHUNK - start % PREFILL_CHUNK)
            self._pass([text], chunk - start, planned=self._reads_prompts)

    def _pass(self, texts: list[Text], count: int | None, planned: bool) -> None:
        """One pass of the next ``count`` tokens of each text; None is all that wait."""
        ids = [text.waiting[:count] for text in texts]
        pool = texts[0].cache.pool
        assert isinstance(pool, LeadPool), "it was made before the model became a stage"
        places = [self._place(text, len(new)) for text, new in zip(texts, ids, strict=True)]
        work = Pass(
            pool.number, pool.max_tokens, planned, places, list(pool.copies),
            self._news(texts, places),
        )  # fmt: skip
        x = torch.tensor([token for new in ids for token in new])
        self._send(work, x, texts, ids)

    def _send(
        self,
        work: Pass,
        x: Tensor,
        texts: list[Text],
        ids: list[list[int]],
        ahead: Ahead | None = None,
    ) -> None:
        """Computes this stage of a pass, sends it on, and prepares the next one."""
        while len(self._under_way) >= RESULTS:
            self._take_result()
        number = next(self._numbers)
        caches = [text.cache for text in texts]
        message = self._outbox.take()
        try:
            if ahead is None:
                out = message.put_pass(number, work, self._hidden_size)
            else:
                out = message.put_head(number, ahead.head, self._hidden_size)
            with self._inference_mode:
                self._stage.compute(work, x, caches, out, ahead)
        except BaseException:
            self._outbox.put_back(message)
            raise
        with Deferral():  # it is sent and accounted for, or neither
            self._outbox.send(message)
            self._account(number, work, texts, ids)
        self._look_ahead(work, texts)

    def _look_ahead(self, work: Pass, texts: list[Text]) -> None:
        """Prepares what probably comes next for the texts of a pass that is on its way."""
        following = work.next()
        if following is None:
            return
        ahead = self._stage.look_ahead(following, [text.cache for text in texts])
        if ahead is not None:
            texts[0].lane = _Lane(ahead, [self._slots[text.cache] for text in texts])

    def _continues(self, lane: _Lane, texts: list[Text]) -> bool:
        """Whether the next pass of texts is the one that was looked ahead to."""
        pool: Any = texts[0].cache.pool
        if pool.copies or any(self._gone.values()):  # the other stages have to be told
            return False
        return lane.is_of(texts, [self._slots.get(text.cache) for text in texts])

    def _place(self, text: Text, count: int) -> Place:
        cache = text.cache
        table = cache.block_table
        slot = self._slot(cache)
        known = slot.table
        keep = len(known)
        if table[:keep] != known:
            keep = next(
                (i for i, pair in enumerate(zip(known, table)) if pair[0] != pair[1]),
                min(keep, len(table)),
            )
        length = len(text.tokens)
        want = _want(text) if cache.length + count == length else Want.NOTHING
        return Place(
            slot.number, cache.length, count, length, keep, table[keep:],
            text.number, want,
        )  # fmt: skip

    def _slot(self, cache: Sequence) -> _Slot:
        if cache not in self._slots:
            self._slots[cache] = slot = _Slot(next(self._numbers))
            weakref.finalize(cache, self._gone["slots"].append, slot.number)
        return self._slots[cache]

    def _news(self, texts: list[Text], places: list[Place]) -> dict[str, Any]:
        """What the other stages have to hear about with this pass."""
        news: dict[str, Any] = {name: list(numbers) for name, numbers in self._gone.items()}
        news["texts"] = [
            {
                "number": text.number,
                "sampling": asdict(text.sampling),
                "recent": _recent(text),
            }
            for text, place in zip(texts, places, strict=True)
            if place.want in (Want.TOKEN, Want.LOGPROBS)
            and text.sampling is not None
            and text.number not in self._known
        ]
        return {name: value for name, value in news.items() if value}

    def _account(self, number: int, work: Pass, texts: list[Text], ids: list[list[int]]) -> None:
        """Takes down that a pass was sent: from here on it counts."""
        for name, numbers in self._gone.items():  # some may have come since it was written
            del numbers[: len(work.news.get(name, ()))]
        pool: Any = texts[0].cache.pool
        del pool.copies[: len(work.copies)]
        if pool not in self._pools:
            self._pools.add(pool)
            weakref.finalize(pool, self._gone["pools"].append, pool.number)
        for text, new in zip(texts, ids, strict=True):
            slot, table = self._slots[text.cache], text.cache.block_table
            if slot.table != table:
                slot.table = list(table)
            text.cache.append(new)
            if text.number not in self._texts:
                self._texts.add(text.number)
                weakref.finalize(text, self._forget_text, text.number)
            self._results.pop(text.number, None)
        for news in work.news.get("texts", ()):
            self._known.add(news["number"])
        if work.wants_result:
            self._under_way.append(number)

    def _forget_text(self, number: int) -> None:
        self._texts.discard(number)
        self._results.pop(number, None)
        if number in self._known:
            self._known.discard(number)
            self._gone["texts_gone"].append(number)

    def _take_result(self) -> None:
        """Waits for the oldest result that is under way."""
        self._reuse()
        try:
            self._inbox.wait()
        except PipelineError:
            self._is_over = True
            raise
        with Deferral():
            self._sort_result()

    def _reuse(self) -> None:
        """Gives the last result's buffer back. Not earlier: with gloo that takes 100 us, in which
        the others would have nothing to do."""
        with Deferral():
            if self._read is not None:
                self._inbox.give_back(self._read)
                self._read = None

    def _sort_result(self) -> None:
        """Gives each text of a result that has come what is its own."""
        message = self._inbox.take()
        if message.kind == Kind.CONTROL:
            self._is_over = True
            raise PipelineError(message.control().get("failed", "the pipeline has ended."))
        number, drawn = message.read_result()
        numbers = message.rows(self._vocab_size)
        numbers = numbers.clone() if len(numbers) else numbers  # the buffer is about to be reused
        self._read = message
        self._under_way.remove(number)
        for text, token in drawn:
            if text in self._texts:
                self._results[text] = token, numbers[0] if len(numbers) else None


class _Slot:
    """A text's number among the stages, and the block table that they know: a list that stays as it
    is, until another one takes its place.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.table: list[int] = []


class _Lane:
    """Texts that are decoded together, and the pass that was prepared for them: x int64 [texts] and
    ``ids`` take their tokens.
    """

    def __init__(self, ahead: Ahead, slots: list[_Slot]) -> None:
        self.ahead = ahead
        self._slots = slots
        self._tables = [slot.table for slot in slots]
        self.x = torch.zeros(len(slots), dtype=torch.int64)
        self.ids = [[0] for _ in slots]
        self._tokens: memoryview = self.x.numpy().data

    def is_of(self, texts: list[Text], slots: list[_Slot | None]) -> bool:
        """Whether the pass is that of these texts, whose places among the stages are ``slots``."""
        return slots == self._slots and all(
            text.number == place.text
            and len(text.tokens) == place.length
            and text.cache.length == place.start
            and text.cache.block_table == slot.table == table
            for text, place, slot, table in zip(
                texts, self.ahead.work.places, self._slots, self._tables
            )
        )

    def take(self, texts: list[Text]) -> None:
        """Takes the last token of each text."""
        for i, text in enumerate(texts):
            self._tokens[i] = self.ids[i][0] = text.tokens[-1]


def _want(text: Text) -> Want:
    if text.sampling is None:
        return Want.LOGITS
    return Want.LOGPROBS if text.logprobs else Want.TOKEN


def _recent(text: Text) -> list[int]:
    """The tokens of a text that its penalties look back at."""
    sampling = text.sampling
    if sampling is None or not sampling.logits_processors():
        return []
    return text.tokens[-sampling.repetition_context_size :]
