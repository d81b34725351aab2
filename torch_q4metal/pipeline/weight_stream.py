"""Weights for ranks that have no files: rank 0 reads them, the ring carries, a cache keeps them.

Rank 0 describes the checkpoint (config, names and shapes of all tensors), then sends in batches:
each rank says how much it has of each piece of its own layers, and gets what comes next. A chunk
carries its SHA-256, and one that arrives damaged is sent again with the next batch. So nothing that
is in a cache travels, and what broke off goes on where it was. A rank hands on what later ranks
want.

Rank 0 calls ``send_weights``, between two other control messages; the others give every control
message to a ``WeightReceiver``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import struct
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..config import read_checkpoint_config
from ..errors import CheckpointError, PipelineError, Q4MetalError
from ..models.part import Part
from ..safetensors_header import DTYPE_NAMES, DTYPES, TensorInfo, printable
from .handshake import RankInfo, ask_round, require_answers
from .transport import Transfer, Transport
from .weight_pieces import CHUNK_BYTES, PartialPiece, Piece, PieceCache, cut_into_pieces

logger = logging.getLogger(__name__)

BATCH_CHUNKS = 64
"""Chunks before rank 0 asks again: the question takes one round trip, a batch at 1 Gbit/s 0.5 s."""
_SLICE = 100_000  # characters of the description that fit into a control message, escaped
_ATTEMPTS = 3  # batches in a row that may bring nothing
_NEWS_SECONDS = 2.0
_HEADER = struct.Struct("<32s32sqqq")  # SHA-256 of piece and chunk, offset, length, last rank
_CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class _Wanted:
    """A piece that a rank needs."""

    rank: int
    sha256: str
    piece: Piece


def send_weights(
    transport: Transport, checkpoint: Checkpoint, ranges: list[range], infos: list[RankInfo]
) -> None:
    """Rank 0: brings the ranks that have no files (``info.streams``) to what their layers need.

    ``ranges``: the layers of each rank. Raises PipelineError for what a rank has to say, or if its
    chunks keep arriving damaged, and CheckpointError if the files cannot be read.
    """
    ranks = [info.rank for info in infos if info.streams]
    if not ranks:
        return
    _send_description(transport, checkpoint)
    wanted = _wanted_pieces(checkpoint, ranges, ranks)
    question = {
        "weights": {
            str(rank): {
                "layers": [ranges[rank].start, ranges[rank].stop, ranges[-1].stop],
                "pieces": [[w.sha256, w.piece.size] for w in wanted if w.rank == rank],
            }
            for rank in ranks
        }
    }
    progress = _Progress(sum(w.piece.size for w in wanted), [infos[rank] for rank in ranks])
    before, attempts = -1, 0
    while True:
        answers = ask_round(transport, question | {"answers": []})["answers"]
        require_answers(answers)
        lengths = {(a["rank"], sha): length for a in answers for sha, length in a["have"].items()}
        there = sum(lengths.values())
        progress.show(there)
        if all(lengths[w.rank, w.sha256] == w.piece.size for w in wanted):
            return
        attempts = 0 if there > before else attempts + 1
        if attempts == _ATTEMPTS:
            raise PipelineError(
                f"weights for {progress.names} arrive damaged again and again; test the network "
                "between the machines, and their memory."
            )
        before = there
        _send_batch(transport, wanted, lengths)


def _send_description(transport: Transport, checkpoint: Checkpoint) -> None:
    files = {name: checkpoint.path / name for name in _CONFIGS}
    tensors = [
        [info.name, DTYPE_NAMES[info.dtype], list(info.shape)]
        for info in checkpoint.tensors.values()
    ]
    try:
        configs = {n: f.read_text(encoding="utf-8") for n, f in files.items() if f.is_file()}
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}.") from None
    text = json.dumps({"configs": configs, "tensors": tensors})
    for begin in range(0, len(text), _SLICE):
        ask_round(transport, {"description": text[begin : begin + _SLICE], "begin": begin})


def _wanted_pieces(checkpoint: Checkpoint, ranges: list[range], ranks: list[int]) -> list[_Wanted]:
    tied = not checkpoint.has("lm_head.weight")
    pieces = []
    for rank in ranks:
        own = checkpoint.only(Part(ranges[rank], ranges[-1].stop, tied).owns)
        pieces += [(rank, piece) for piece in cut_into_pieces(own.tensors.values())]
    size = sum(piece.size for _, piece in pieces)
    logger.info("reading %.2f GB of weights that other ranks need, for their checksums", size / 1e9)
    return [_Wanted(rank, piece.sha256(), piece) for rank, piece in pieces]


def _send_batch(
    transport: Transport, wanted: list[_Wanted], lengths: dict[tuple[int, str], int]
) -> None:
    """The next chunks of what ranks do not have yet."""
    chunks: list[tuple[_Wanted, int]] = []
    for want in wanted:
        begin = lengths[want.rank, want.sha256]
        for offset in range(begin, want.piece.size, CHUNK_BYTES):
            if len(chunks) < BATCH_CHUNKS:
                chunks.append((want, offset))
    passing = [sum(want.rank >= rank for want, _ in chunks) for rank in range(transport.world_size)]
    ask_round(transport, {"chunks": passing})
    buffers = [torch.empty(_HEADER.size + CHUNK_BYTES, dtype=torch.uint8) for _ in range(2)]
    leaving: deque[Transfer] = deque()
    error: CheckpointError | None = None
    for number, (want, offset) in enumerate(chunks):
        if len(leaving) == len(buffers):
            leaving.popleft().wait()
        buffer = buffers[number % len(buffers)]
        length = min(CHUNK_BYTES, want.piece.size - offset)
        try:
            if error is None:
                _write_chunk(buffer.numpy().data, want, offset, length)
        except CheckpointError as reason:  # the ranks still wait for as many as were announced
            error = reason
        if error is not None:
            length = 0
            _HEADER.pack_into(buffer.numpy().data, 0, b"", b"", 0, length, want.rank)
        leaving.append(transport.send(buffer[: _HEADER.size + length]))
    for transfer in leaving:
        transfer.wait()
    if error is not None:
        raise error


def _write_chunk(memory: memoryview, want: _Wanted, offset: int, length: int) -> None:
    data = memory[_HEADER.size :][:length]
    want.piece.read(offset, data)
    names = bytes.fromhex(want.sha256), hashlib.sha256(data).digest()
    _HEADER.pack_into(memory, 0, *names, offset, length, want.rank)


class _Progress:
    """Tells in the log how far it is: not too often, and what began in the cache as such."""

    def __init__(self, total: int, infos: list[RankInfo]) -> None:
        self.names = ", ".join(f"rank {info.rank} on {info.host}" for info in infos)
        self._total = total
        self._begin: tuple[float, int] | None = None
        self._told = 0.0

    def show(self, there: int) -> None:
        now = time.monotonic()
        if self._begin is None:
            self._begin = now, there
            cached = f", {there / 1e9:.2f} GB of it there already" if there else ""
            logger.info("weights for %s: %.2f GB%s", self.names, self._total / 1e9, cached)
            return
        if now - self._told < _NEWS_SECONDS and there < self._total:
            return
        self._told = now
        rate = (there - self._begin[1]) / max(now - self._begin[0], 1e-9)
        logger.info(
            "weights for %s: %.2f of %.2f GB, %.1f MB/s", self.names, there / 1e9,
            self._total / 1e9, rate / 1e6,
        )  # fmt: skip


class WeightReceiver:
    """What a rank behind the first does about weights, whether it needs any or hands them on."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._cache = PieceCache()
        self._text = ""  # the description, as far as it has come
        self._model: _Streamed | None = None
        self._partial: dict[str, PartialPiece] = {}
        self._error: Q4MetalError | None = None

    def answer(self, content: dict[str, Any]) -> None:
        """Before a control message is passed on: adds what this rank has to say."""
        if "description" in content:
            self._text = self._text[: content["begin"]] + content["description"]
        order = content.get("weights", {}).get(str(self._transport.rank))
        if order is None:
            return
        info: dict[str, Any] = {"rank": self._transport.rank, "host": os.uname().nodename}
        try:
            if self._model is None:
                self._model = self._begin(order)
            if self._error is not None:
                raise self._error
            info["have"] = {sha256: self._length(sha256, size) for sha256, size in order["pieces"]}
        except Q4MetalError as error:
            self._close()
            info["error"] = str(error)
        content["answers"].append(info)

    def follow(self, content: dict[str, Any]) -> None:
        """After a control message was passed on: takes the chunks that come behind it."""
        if "chunks" in content:
            for chunk in self._chunks(content["chunks"][self._transport.rank]):
                try:
                    self._take(chunk.numpy().data)
                except Q4MetalError as error:  # the ring goes on; rank 0 hears it next time
                    self._error = error

    def checkpoint(self) -> Checkpoint | None:
        """All names and shapes, and the bytes of this rank's layers; None if nothing was sent."""
        return None if self._model is None else self._model.checkpoint(self._cache)

    def _begin(self, order: dict[str, Any]) -> _Streamed:
        """Opens what has to come."""
        model = _Streamed(self._text, order, self._cache)
        missing = [pair for pair in order["pieces"] if not self._cache.has(*pair)]
        for sha256, size in missing:
            self._partial[sha256] = PartialPiece(self._cache, sha256, size)
        left = sum(partial.size - partial.length for partial in self._partial.values())
        self._cache.require_space(left)
        return model

    def _length(self, sha256: str, size: int) -> int:
        """Bytes of a piece that are there. All of them are only once it has its name."""
        partial = self._partial.get(sha256)
        if partial is None:
            return size
        if partial.length < size:
            return partial.length
        if not partial.finish():
            logger.warning("a piece of the weights was damaged on this disk; it is sent again")
            return 0
        del self._partial[sha256]
        return size

    def _chunks(self, count: int) -> Iterator[Tensor]:
        """The next ``count`` chunks, handed on where a later rank wants them."""
        buffers = [torch.empty(_HEADER.size + CHUNK_BYTES, dtype=torch.uint8) for _ in range(2)]
        coming = deque(self._transport.receive(buffer) for buffer in buffers[:count])
        for number in range(count):
            buffer = buffers[number % 2]
            coming.popleft().wait()
            *_, length, last_rank = _HEADER.unpack_from(buffer.numpy().data)
            if last_rank > self._transport.rank:
                self._transport.send(buffer[: _HEADER.size + length]).wait()
            yield buffer
            if number + 2 < count:
                coming.append(self._transport.receive(buffer))

    def _take(self, memory: memoryview) -> None:
        piece, digest, offset, length, _ = _HEADER.unpack_from(memory)
        partial = self._partial.get(piece.hex())
        if self._error is not None or partial is None or offset != partial.length:
            return  # it is not for this rank, or lies behind a damaged one
        data = memory[_HEADER.size :][:length]
        if hashlib.sha256(data).digest() == digest:
            partial.append(data)
        else:
            logger.warning("a chunk of the weights arrived damaged; it is sent again")

    def _close(self) -> None:
        for partial in self._partial.values():
            partial.close()


class _Streamed:
    """A checkpoint that another rank has described."""

    def __init__(self, text: str, order: dict[str, Any], cache: PieceCache) -> None:
        """Raises CheckpointError if it cannot be kept, or is none."""
        description = json.loads(text)
        name = hashlib.sha256(text.encode()).hexdigest()
        self._path = cache.write_texts(f"{name}.model", description["configs"])
        self._infos = [_tensor_info(self._path, *entry) for entry in description["tensors"]]
        self._hashes = [sha256 for sha256, _ in order["pieces"]]
        begin, end, total = order["layers"]
        tied = not any(info.name == "lm_head.weight" for info in self._infos)
        self._part = Part(range(begin, end), total, tied)

    def checkpoint(self, cache: PieceCache) -> Checkpoint:
        tensors = {info.name: info for info in self._infos}
        own = cut_into_pieces(info for info in self._infos if self._part.owns(info.name))
        for piece, sha256 in zip(own, self._hashes, strict=True):
            tensors |= {info.name: info for info in piece.moved_to(cache.file(sha256))}
        return Checkpoint(self._path, read_checkpoint_config(self._path), tensors)


def _tensor_info(path: Path, name: str, dtype: str, shape: list[int]) -> TensorInfo:
    """What is known of a tensor whose bytes are elsewhere."""
    if dtype not in DTYPES or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise CheckpointError(
            f"rank 0 says that tensor {printable(name)} is {dtype} {shape}, which is none."
        )
    size = math.prod(shape) * DTYPES[dtype].itemsize
    return TensorInfo(name, DTYPES[dtype], tuple(shape), path / "on rank 0", 0, size)
