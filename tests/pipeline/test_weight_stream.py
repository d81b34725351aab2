"""Weights that come from rank 0. The ranks are threads with a cache in common."""

import hashlib
import itertools
import os
import queue
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tiny
import torch
from ring import QueueTransport
from typer.testing import CliRunner

from torch_q4metal import cluster
from torch_q4metal.checkpoint import Checkpoint
from torch_q4metal.errors import CheckpointError, PipelineError
from torch_q4metal.generation import generate_step
from torch_q4metal.models import load_model
from torch_q4metal.pipeline import launch, weight_pieces, weight_stream
from torch_q4metal.pipeline.handshake import Settings
from torch_q4metal.pipeline.weight_pieces import PartialPiece, Piece, PieceCache, cut_into_pieces

CHUNK = 4096
PROMPT = [5, 9, 200, 31, 77]


class Wire(QueueTransport):
    """Notes rank 0's chunks of weights, and lets a test change them."""

    def __init__(self, rank, links, change):
        super().__init__(rank, links)
        self.chunks, self._change = [], change

    def send(self, message):
        is_chunk = int(message[:8].view(torch.int64)) not in (1, 2, 3)
        if is_chunk and self.rank == 0:
            message = message.clone()
            if self._change is not None:
                self._change(len(self.chunks), message)
            self.chunks.append(len(message))
        return super().send(message)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, tmp_path):
    monkeypatch.setattr(weight_stream, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(weight_pieces, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(weight_stream, "BATCH_CHUNKS", 7)
    monkeypatch.setenv("Q4METAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def path(tmp_path):
    return tiny.write_tiny(
        tmp_path / "model", "qwen2", tied=False, layers=4, shards=2, tokenizer=False
    ).path


@contextmanager
def ring(path, folders, split, change=None, wire=None, stream_weights=True):
    """(rank 0's model, rank 0's transport); the others look into ``folders``."""
    links = [queue.SimpleQueue() for _ in range(len(folders) + 1)]
    transports = [(wire or Wire)(rank, links, change) for rank in range(len(links))]

    def serve(transport, folder):
        torch.set_num_threads(1)
        try:
            launch.serve(transport, lambda: folder)
        except PipelineError:
            transport.close()

    threads = [
        threading.Thread(target=serve, args=pair, daemon=True)
        for pair in zip(transports[1:], folders, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        settings = Settings(split=split, stream_weights=stream_weights)
        model = launch.lead(transports[0], lambda: path, settings)
        yield model, transports[0]
        model.engine.close()
    finally:
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()


def tokens_of(model):
    return [token for token, _ in generate_step(list(PROMPT), model, max_tokens=8)]


def cached(tmp_path):
    """Names of the whole pieces in the cache, and of the begun ones."""
    files = [file for file in (tmp_path / "cache/streamed").glob("*") if file.is_file()]
    whole = {file.name for file in files if file.suffix != ".partial"}
    return whole, {file.name for file in files} - whole


def own_pieces(path, layers):
    return [
        piece
        for piece in cut_into_pieces(Checkpoint.open(path).tensors.values())
        if any(f"layers.{i}." in piece.infos[0].name for i in layers)
        or (3 in layers and piece.infos[0].name.startswith(("lm_head", "model.norm")))
    ]


@pytest.mark.parametrize(("family", "tied"), [("qwen2", False), ("llama", True)])
def test_ranks_without_files_draw_the_same_tokens(tmp_path, family, tied):
    """Rank 1 has files, ranks 2 and 3 an empty folder and none; the middle ones hand on."""
    path = tiny.write_tiny(tmp_path / "m", family, tied=tied, layers=4, shards=2).path
    (tmp_path / "empty").mkdir()
    with ring(path, [path, tmp_path / "empty", tmp_path / "none"], "1,1,1,1") as (model, _):
        assert tokens_of(model) == tokens_of(load_model(path))
        held = [stage["weight_bytes"] for stage in model.engine.stages]
    table = sum(
        t.nbytes for n, t in Checkpoint.open(path).tensors.items() if n.startswith("model.embed")
    )
    assert sum(held) == Checkpoint.open(path).weight_bytes + (table if tied else 0)


def test_only_own_layers_arrive_and_with_the_same_bytes(path, tmp_path):
    with ring(path, [tmp_path], "1,3"):
        pass
    pieces = own_pieces(path, [1, 2, 3])
    assert cached(tmp_path) == ({piece.sha256() for piece in pieces}, set())
    original = Checkpoint.open(path)
    for piece in pieces:
        for moved in piece.moved_to(PieceCache().file(piece.sha256())):
            raw = moved.file.read_bytes()[moved.begin : moved.end]
            source = original.info(moved.name)
            assert raw == source.file.read_bytes()[source.begin : source.end]


def test_what_is_cached_does_not_travel_again(path, tmp_path):
    with ring(path, [tmp_path], "1,3"):
        pass
    with ring(path, [tmp_path], "1,3") as (model, wire):
        assert wire.chunks == []
        assert tokens_of(model) == tokens_of(load_model(path))
    with ring(path, [tmp_path], "3,1") as (model, wire):  # another split needs no more
        assert wire.chunks == []
        assert tokens_of(model) == tokens_of(load_model(path))


def test_a_transfer_that_breaks_off_goes_on_there(path, tmp_path):
    """Rank 0's links break with the tenth chunk. What had arrived before does not travel again."""

    class CutWire(Wire):
        is_cut = False

        def send(self, message):
            if self.rank == 0 and (CutWire.is_cut or len(self.chunks) == 9):
                CutWire.is_cut = True
                self.close()
                raise PipelineError("the link to rank 1 is gone (cut).")
            return super().send(message)

    with (
        pytest.raises(PipelineError, match="link to rank 1 is gone"),
        ring(path, [tmp_path], "1,3", wire=CutWire),
    ):
        pass
    whole, begun = cached(tmp_path)
    folder = PieceCache().folder
    kept = sum((folder / name).stat().st_size for name in whole | begun)
    assert begun
    assert kept > 6 * CHUNK
    with ring(path, [tmp_path], "1,3") as (model, wire):
        assert tokens_of(model) == tokens_of(load_model(path))
    sent = sum(wire.chunks) - len(wire.chunks) * weight_stream._HEADER.size
    assert kept + sent == sum(piece.size for piece in own_pieces(path, [1, 2, 3]))
    assert cached(tmp_path)[1] == set()


def test_a_damaged_chunk_is_sent_again(path, tmp_path, caplog):
    def damage(number, message):
        if number == 3:
            message[-1] ^= 1

    with ring(path, [tmp_path], "1,3", damage) as (model, _):
        assert tokens_of(model) == tokens_of(load_model(path))
    assert "a chunk of the weights arrived damaged" in caplog.text
    assert cached(tmp_path) == ({p.sha256() for p in own_pieces(path, [1, 2, 3])}, set())


def test_chunks_that_are_always_damaged_end_it(path, tmp_path):
    def damage(number, message):
        message[-1] ^= 1

    with (
        pytest.raises(PipelineError, match=r"weights for rank 1 on .* damaged again and again"),
        ring(path, [tmp_path], "1,3", damage),
    ):
        pass
    assert cached(tmp_path)[0] == set()


def test_a_begun_piece_that_was_damaged_on_the_disk_is_never_used(path, tmp_path):
    """Its chunks were right when they came: the whole one's checksum tells."""
    piece = own_pieces(path, [2])[0]
    file = PieceCache().file(piece.sha256())
    file.parent.mkdir(parents=True)
    file.with_name(f"{file.name}.partial").write_bytes(bytes(CHUNK))
    with ring(path, [tmp_path], "1,3") as (model, _):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.name
        assert tokens_of(model) == tokens_of(load_model(path))


def test_a_piece_of_another_size_is_fetched_again(path, tmp_path):
    file = PieceCache().file(own_pieces(path, [2])[0].sha256())
    file.parent.mkdir(parents=True)
    file.write_bytes(b"cut")
    with ring(path, [tmp_path], "1,3") as (model, _):
        assert tokens_of(model) == tokens_of(load_model(path))


def test_a_disk_that_is_too_small_is_told_by_rank_0(path, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_pieces.shutil, "disk_usage", lambda folder: SimpleNamespace(free=9))
    with (
        pytest.raises(PipelineError, match=r"rank 1 on .* weights are to come into .* 0.00 GB are"),
        ring(path, [tmp_path], "1,3"),
    ):
        pass


def test_a_file_that_rank_0_cannot_read_any_more_ends_it(path, tmp_path, monkeypatch):
    reads, read = itertools.count(), Piece.read

    def fail(piece, begin, view):
        if next(reads) == 30:
            raise CheckpointError("model.safetensors became shorter while it was being sent.")
        read(piece, begin, view)

    monkeypatch.setattr(Piece, "read", fail)
    with pytest.raises(CheckpointError, match="shorter"), ring(path, [tmp_path], "1,3"):
        pass


def test_without_the_flag_a_rank_without_files_is_refused(path, tmp_path):
    with (
        pytest.raises(PipelineError, match=r"rank 1 on .*: .* does not exist"),
        ring(path, [tmp_path / "none"], "1,3", stream_weights=False),
    ):
        pass


def test_names_of_pieces_cannot_lead_out_of_the_cache():
    for name in ("../" * 8 + "etc/passwd", "A" * 64, ""):
        with pytest.raises(CheckpointError, match="no SHA-256"):
            PieceCache().file(name)


def test_two_processes_do_not_write_the_same_piece():
    cache = PieceCache()
    cache.require_space(0)
    first = PartialPiece(cache, "a" * 64, 9)
    with pytest.raises(CheckpointError, match="another process"):
        PartialPiece(cache, "a" * 64, 9)
    first.close()
    PartialPiece(cache, "a" * 64, 9).close()


def test_what_is_kept_is_shown_and_removed(path, tmp_path):
    """By its last use; never what is being received, nor what is somebody else's."""
    folder = tmp_path / "folder"
    with ring(path, [folder], "2,2"):
        pass
    cache = PieceCache()
    files, size = cache.used()
    assert size > 4 * CHUNK
    assert cache.used(1) == (0, 0)
    (cache.folder / "notes.txt").write_text("mine")
    coming = PartialPiece(cache, "ab" * 32, 10)
    old = max(cache.folder.glob("[0-9a-f]" * 64), key=lambda file: file.stat().st_size)
    os.utime(old, (1, 1))
    assert cache.used(1) == (1, old.stat().st_size)
    with ring(path, [folder], "2,2"):  # it is used again
        pass
    assert cache.used(1) == (0, 0)
    os.utime(old, (1, 1))
    shown = CliRunner().invoke(cluster.app, ["weights", "--remove-unused", "30"])
    assert "removed 1 files" in shown.stderr
    assert f"{cache.folder}: {files} files" in shown.stdout  # one more, one less
    assert not old.exists()
    assert CliRunner().invoke(cluster.app, ["weights", "--remove-unused", "0"]).exit_code == 0
    assert sorted(file.name for file in cache.folder.iterdir()) == [
        f"{'ab' * 32}.partial", "notes.txt"
    ]  # fmt: skip
    coming.close()
