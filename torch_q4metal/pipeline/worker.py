"""A rank behind the first: computes the passes that arrive and hands them on, until it is told."""

from __future__ import annotations

import socket
from collections import deque
from typing import Any

import torch
from torch import Tensor

from ..cache import Sequence
from ..errors import PipelineError
from ..models.base import CausalLM
from ..sampling import SamplingParams
from ..text import Choice
from .message import Kind, Message, Pass, Want, pass_bytes, result_bytes
from .stage import Ahead, Stage, StageCache
from .transport import Transfer, Transport

_BUFFERS = 2  # one is computed on while the other is under way
RESULTS = 4
"""Results that rank 0 has receives for, and so how many passes that want one may be under way."""


class Outbox:
    """Buffers that take turns; one is written to once its last message has left."""

    def __init__(self, transport: Transport, capacity: int) -> None:
        self._transport = transport
        self._capacity = capacity
        self._free = deque(Message(capacity) for _ in range(_BUFFERS))
        self._leaving: deque[tuple[Message, Transfer]] = deque()

    def take(self) -> Message:
        """A message to write. Waits until one is free."""
        if self._free:
            return self._free.popleft()
        if not self._leaving:  # an interrupt has lost the others
            return Message(self._capacity)
        message, transfer = self._leaving[0]
        transfer.wait()
        self._leaving.popleft()
        return message

    def send(self, message: Message) -> None:
        """Starts to send what ``take`` gave."""
        self._leaving.append((message, self._transport.send(message.tensor)))

    def send_end(self, content: dict[str, Any], next_rank: int) -> None:
        """Sends a last control message, once for each receive that waits for it, and waits."""
        for _ in range(RESULTS if next_rank == 0 else _BUFFERS):
            message = self.take()
            message.put_control(content)
            self.send(message)
        self.flush()

    def put_back(self, message: Message) -> None:
        """Gives back unsent what ``take`` gave."""
        self._free.append(message)

    def flush(self) -> None:
        """Returns when everything has left."""
        while self._leaving:
            message, transfer = self._leaving.popleft()
            transfer.wait()
            self._free.append(message)


class Inbox:
    """Receives that always wait ahead of their messages."""

    def __init__(self, transport: Transport, capacity: int, buffers: int = _BUFFERS) -> None:
        self._transport = transport
        self._waiting: deque[tuple[Message, Transfer]] = deque()
        for _ in range(buffers):
            self.give_back(Message(capacity))

    def wait(self) -> None:
        """Returns when the next message is there."""
        self._waiting[0][1].wait()

    def take(self) -> Message:
        """The message that ``wait`` has waited for; it is the caller's until it is given back."""
        return self._waiting.popleft()[0]

    def next(self) -> Message:
        """Waits for the next message, and takes it."""
        self.wait()
        return self.take()

    def give_back(self, message: Message) -> None:
        self._waiting.append((message, self._transport.receive(message.buffer)))

    def drain(self) -> None:
        """Takes what ``send_end`` sent besides the message that was taken already."""
        while self._waiting:
            self.next()


class Chooser:
    """Draws tokens on the last stage, for the texts whose settings it was told."""

    def __init__(self) -> None:
        self._texts: dict[int, tuple[Choice, list[int]]] = {}

    def hear(self, news: dict[str, Any]) -> None:
        """Takes up new texts, with the tokens that a repetition penalty looks back at."""
        for number in news.get("texts_gone", ()):
            self._texts.pop(number, None)
        for text in news.get("texts", ()):
            sampling = SamplingParams(**text["sampling"])
            self._texts[text["number"]] = Choice.of(sampling), text["recent"]

    def draw(self, text: int, logits: Tensor, wants_logprobs: bool) -> tuple[int, Tensor | None]:
        """(token, log-probabilities [V] if wanted) of logits [V]."""
        choice, recent = self._texts[text]
        token, logprobs = choice.draw(recent, logits, wants_logprobs)
        recent.append(token)
        return token, logprobs


class Worker:
    """One stage behind the first, with its model, and the links to its neighbours."""

    def __init__(self, transport: Transport, model: CausalLM) -> None:
        config = model.config
        self._model = model
        self._hidden_size = config.hidden_size
        self._rank = transport.rank
        self._next = (transport.rank + 1) % transport.world_size
        self._stage = Stage(model)
        self._cache = StageCache(model)
        self._chooser = Chooser()
        self._ahead: dict[bytes, tuple[Ahead, list[Sequence]]] = {}  # by head
        size = pass_bytes(config.hidden_size, model.max_kv_size)
        self._inbox = Inbox(transport, size)
        leaving = result_bytes(config.vocab_size) if model.part.has_head else size
        self._outbox = Outbox(transport, leaving)

    @torch.inference_mode()
    def run(self) -> bool:
        """Works until rank 0 says that it is over; False if it is over because a stage failed.

        Raises PipelineError if a neighbour is gone.
        """
        while True:
            message = self._inbox.next()
            if message.kind == Kind.CONTROL:
                content = message.control()
                if "failed" not in content:
                    self._inbox.drain()
                self._outbox.send_end(content, self._next)
                return "failed" not in content
            try:
                work = self._work(message)
                self._inbox.give_back(message)
                self._look_ahead(work)
            except PipelineError:
                raise
            except Exception as error:
                failed = f"rank {self._rank} on {socket.gethostname()} failed: "
                failed += f"{type(error).__name__}: {error}"
                self._outbox.send_end({"failed": failed}, self._next)
                raise

    def _work(self, message: Message) -> Pass:
        """Computes a pass and sends what comes of it."""
        ahead, texts = self._ahead.pop(message.short_head, (None, []))
        if ahead is not None:
            work = ahead.work
        else:
            work = message.read_pass()
            texts = self._cache.follow(work)
            self._forget_ahead(work)
        x = message.rows(self._hidden_size)
        if self._model.part.has_head:
            logits = self._stage.compute(work, x, texts, None, ahead)
            self._finish(work, message.number, ahead.rows if ahead is not None else list(logits))
        else:
            answer = self._outbox.take()
            out = answer.copy_pass(message, self._hidden_size)
            self._stage.compute(work, x, texts, out, ahead)
            self._outbox.send(answer)
        return work

    def _look_ahead(self, work: Pass) -> None:
        """Prepares what probably comes next for the texts of a pass."""
        following = work.next()
        if following is not None:
            texts = self._cache.texts(following)
            ahead = self._stage.look_ahead(following, texts)
            if ahead is not None:
                self._ahead[ahead.head] = ahead, texts

    def _forget_ahead(self, work: Pass) -> None:
        """Forgets what was prepared for block tables that a pass may have changed, or ended."""
        changed = {place.slot for place in work.places}.union(work.news.get("slots", ()))
        for head, (ahead, _) in list(self._ahead.items()):
            if not changed.isdisjoint(place.slot for place in ahead.work.places):
                del self._ahead[head]

    def _finish(self, work: Pass, number: int, logits: list[Tensor]) -> None:
        if work.news:
            self._chooser.hear(work.news)
        if not work.wants_result:
            return
        drawn, rows = [], []
        for place, row in zip(work.places, logits, strict=True):
            token = -1
            if place.want is Want.LOGITS:
                rows.append(row)
            else:
                wants_logprobs = place.want is Want.LOGPROBS
                token, logprobs = self._chooser.draw(place.text, row, wants_logprobs)
                if logprobs is not None:
                    rows.append(logprobs)
            drawn.append((place.text, token))
        answer = self._outbox.take()
        answer.put_result(number, drawn, torch.stack(rows) if rows else None)
        self._outbox.send(answer)
