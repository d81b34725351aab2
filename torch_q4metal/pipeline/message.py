"""What the stages say to each other, as bytes in buffers that are allocated once.

Every message is one piece: a header of little-endian int64 words, lists, and rows of float32. There
are four kinds.

control   a JSON object, for what happens seldom: joining, loading, ending, failing
pass      new tokens of 1 to 8 texts: which blocks of the KV cache they have, from which position,
          and the residual stream [rows, hidden_size] that the stage before made of them
result    the tokens that the last stage drew, and the log-probabilities or logits [texts, V] of
          those texts that want them
filler    bytes that mean nothing, for measuring a link

The first stage alone decides which KV blocks a text gets. The others hold the same blocks for
their own layers, and are told only what changed in a text's block table: ``keep`` entries stay,
``blocks`` come behind them. So a text that is cut back or shares a prefix with another needs no
message.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ..cache import BLOCK, blocks_for
from ..errors import PipelineError
from ..models.base import MATVEC_ROWS, PREFILL_CHUNK

CONTROL_BYTES = 1 << 18
"""Room for a control message, and for the JSON of a pass."""
_HEADER = struct.Struct("<11q")  # kind, number, size, and what the kind has
_FRONT = struct.Struct("<2q")  # kind, number
_PLACE = struct.Struct("<8q")
_DRAWN = struct.Struct("<2q")
_ALIGN = 64  # rows begin at multiples of it


class Kind(IntEnum):
    CONTROL = 1
    PASS = 2
    RESULT = 3
    FILLER = 4


class Want(IntEnum):
    """What the first stage wants to know of a text after its pass."""

    NOTHING = 0  # its prompt goes on in the next pass
    TOKEN = 1
    LOGPROBS = 2  # and the token
    LOGITS = 3  # only: the first stage draws


@dataclass(frozen=True)
class Place:
    """Where the new tokens of one text lie.

    slot    the text's block table        keep, blocks   what changed in it, see above
    start   position of the first new token, of ``count``
    length  positions of the text once all passes of its prompt are done
    text    number of the text            want           what is asked about it
    """

    slot: int
    start: int
    count: int
    length: int
    keep: int
    blocks: list[int]
    text: int
    want: Want


@dataclass(frozen=True)
class Pass:
    """One pass over all layers.

    pool, pool_tokens  number and size of the KV pool that the blocks are of
    planned            through the decode plan, otherwise through the modules
    copies             (from, to): blocks to copy first
    news               JSON: texts that the last stage has to draw for, and what may be forgotten
    """

    pool: int
    pool_tokens: int
    planned: bool
    places: list[Place]
    copies: list[tuple[int, int]] = field(default_factory=list)
    news: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(place.count for place in self.places)

    @property
    def wants_result(self) -> bool:
        return any(place.want for place in self.places)

    def next(self) -> Pass | None:
        """The pass that decoding goes on with: one more token for each text.

        None where that takes more than this pass says: the rest of a prompt, new blocks.
        """
        if not all(place.want and (place.start + place.count) % BLOCK for place in self.places):
            return None
        places = [
            Place(
                place.slot, place.start + place.count, 1, place.length + 1,
                place.keep + len(place.blocks), [], place.text, place.want,
            )
            for place in self.places
        ]  # fmt: skip
        return Pass(self.pool, self.pool_tokens, True, places)


def pass_bytes(hidden_size: int, context: int) -> int:
    """Size of a buffer for every pass of a model with this context, in bytes."""
    lists = 4 * (MATVEC_ROWS * blocks_for(context) + 4 * MATVEC_ROWS)
    fixed = _HEADER.size + MATVEC_ROWS * _PLACE.size + CONTROL_BYTES + _ALIGN
    return fixed + lists + 4 * PREFILL_CHUNK * hidden_size


def result_bytes(vocab_size: int) -> int:
    """Size of a buffer for every result, in bytes; only one of its texts may want numbers."""
    return max(CONTROL_BYTES, _HEADER.size + MATVEC_ROWS * _DRAWN.size + _ALIGN + 4 * vocab_size)


def head_of(done: Pass, hidden_size: int) -> bytes:
    """A pass as a message has it, without kind, number and rows."""
    news = json.dumps(done.news).encode() if done.news else b""
    blocks = [block for place in done.places for block in place.blocks]
    numbers = blocks + [block for pair in done.copies for block in pair]
    lists = struct.pack(f"<{len(numbers)}i", *numbers) + news
    begin = _HEADER.size + _PLACE.size * len(done.places)
    offset = -(-(begin + len(lists)) // _ALIGN) * _ALIGN
    header = _HEADER.pack(
        Kind.PASS, 0, offset + 4 * done.rows * hidden_size, done.pool, done.pool_tokens,
        done.planned, len(done.places), len(blocks), len(done.copies), len(news), offset,
    )  # fmt: skip
    places = [
        _PLACE.pack(
            place.slot, place.start, place.count, place.length, place.keep, len(place.blocks),
            place.text, place.want,
        )
        for place in done.places
    ]  # fmt: skip
    return header[_FRONT.size :] + b"".join(places) + lists


def _size_in(head: bytes) -> int:
    size: int = _HEADER.unpack_from(bytes(_FRONT.size) + head)[2]
    return size


class Message:
    """A buffer and what is written in it. Views of its rows hold until it is written anew."""

    def __init__(self, capacity: int) -> None:
        self.buffer = torch.zeros(capacity, dtype=torch.uint8)
        self._memory: memoryview = self.buffer.numpy().data
        # Views that the last message had: the messages of a text that is decoded have the same.
        self._tensor = self.buffer
        self._rows: tuple[tuple[int, int, int], Tensor] = (0, 0, 0), self.buffer

    @property
    def tensor(self) -> Tensor:
        """The message, uint8 [its length]: what a transport sends."""
        if len(self._tensor) != self._size:
            self._tensor = self.buffer[: self._size]
        return self._tensor

    @property
    def kind(self) -> int:
        """One of ``Kind``."""
        return self._header[0]

    @property
    def _header(self) -> tuple[int, ...]:
        return _HEADER.unpack_from(self._memory)

    @property
    def number(self) -> int:
        """Of the pass, as rank 0 counts them."""
        return self._header[1]

    @property
    def _size(self) -> int:
        return self._header[2]

    # ---- control

    def put_control(self, content: dict[str, Any]) -> None:
        """Writes a control message. Raises PipelineError if it is too long."""
        text = json.dumps(content).encode()
        size = _HEADER.size + len(text)
        if size > len(self._memory):
            raise PipelineError(f"a message of {size} bytes is longer than {len(self._memory)}.")
        _HEADER.pack_into(self._memory, 0, Kind.CONTROL, 0, size, len(text), *[0] * 7)
        self._memory[_HEADER.size : size] = text

    def control(self) -> dict[str, Any]:
        """The content of a control message."""
        length = self._header[3]
        content: dict[str, Any] = json.loads(bytes(self._memory[_HEADER.size :][:length]))
        return content

    def put_filler(self) -> None:
        """Makes the whole buffer a message that says nothing."""
        _HEADER.pack_into(self._memory, 0, Kind.FILLER, 0, len(self._memory), *[0] * 8)

    # ---- passes

    def put_pass(self, number: int, done: Pass, hidden_size: int) -> Tensor:
        """Writes all but the rows, and returns their place, f32 [rows, hidden_size].

        Raises PipelineError if it does not fit, which takes a very long list of recent tokens.
        """
        head = head_of(done, hidden_size)
        size = _size_in(head)
        if size > len(self._memory):
            raise PipelineError(
                f"a pass takes a message of {size} bytes, but {len(self._memory)} is the most; "
                "give a smaller repetition_context_size."
            )
        return self.put_head(number, head, hidden_size)

    def put_head(self, number: int, head: bytes, hidden_size: int) -> Tensor:
        """As ``put_pass``, with what ``head_of`` made of the pass."""
        _FRONT.pack_into(self._memory, 0, Kind.PASS, number)
        self._memory[_FRONT.size : _FRONT.size + len(head)] = head
        return self.rows(hidden_size)

    @property
    def short_head(self) -> bytes:
        """What ``head_of`` made of a pass without lists and news; else only the begin of that."""
        texts = self._header[6]
        return bytes(self._memory[_FRONT.size : _HEADER.size + texts * _PLACE.size])

    def read_pass(self) -> Pass:
        """What ``put_pass`` wrote."""
        _, _, _, pool, pool_tokens, planned, texts, blocks, copies, news, _ = self._header
        begin = _HEADER.size + texts * _PLACE.size
        numbers = list(struct.unpack_from(f"<{blocks + 2 * copies}i", self._memory, begin))
        begin += 4 * len(numbers)
        places, at = [], 0
        for i in range(texts):
            slot, start, count, length, keep, new, text, want = _PLACE.unpack_from(
                self._memory, _HEADER.size + i * _PLACE.size
            )
            own = numbers[at : at + new]
            at += new
            places.append(Place(slot, start, count, length, keep, own, text, Want(want)))
        pairs = list(zip(numbers[blocks::2], numbers[blocks + 1 :: 2], strict=True))
        content = json.loads(bytes(self._memory[begin : begin + news])) if news else {}
        return Pass(pool, pool_tokens, bool(planned), places, pairs, content)

    def copy_pass(self, other: Message, hidden_size: int) -> Tensor:
        """Writes the pass of another buffer, and returns the place of its rows, still unwritten."""
        offset = other._header[10]
        self._memory[:offset] = other._memory[:offset]
        return self.rows(hidden_size)

    def rows(self, width: int) -> Tensor:
        """The rows of a pass or a result, f32 [rows, width], in place."""
        _, _, size, *_, offset = self._header
        place = offset, size, width
        if self._rows[0] != place:
            rows = self.buffer[offset:size].view(torch.float32).view(-1, width)
            self._rows = place, rows
        return self._rows[1]

    # ---- results

    def put_result(self, number: int, drawn: list[tuple[int, int]], rows: Tensor | None) -> None:
        """Writes (text, token) pairs, and rows f32 [texts that want them, V]."""
        begin = _HEADER.size + _DRAWN.size * len(drawn)
        offset = -(-begin // _ALIGN) * _ALIGN
        size = offset + (0 if rows is None else 4 * rows.numel())
        _HEADER.pack_into(
            self._memory, 0, Kind.RESULT, number, size, len(drawn), *[0] * 6, offset
        )  # fmt: skip
        for i, pair in enumerate(drawn):
            _DRAWN.pack_into(self._memory, _HEADER.size + i * _DRAWN.size, *pair)
        if rows is not None:
            self.rows(rows.shape[-1]).copy_(rows)

    def read_result(self) -> tuple[int, list[tuple[int, int]]]:
        """(number of the pass, its (text, token) pairs); ``rows`` has the numbers."""
        _, number, _, count, *_ = self._header
        pairs = [
            _DRAWN.unpack_from(self._memory, _HEADER.size + i * _DRAWN.size) for i in range(count)
        ]
        return number, [(text, token) for text, token in pairs]
