"""How ranks agree, or refuse: with threads for ranks and the real launch code."""

import queue
import shutil
import threading

import pytest
import tiny
from ring import QueueTransport
from safetensors.torch import load_file, save_file

from torch_q4metal.checkpoint import Checkpoint
from torch_q4metal.errors import MemoryLimitError, PipelineError, Q4MetalError
from torch_q4metal.generation import generate_step
from torch_q4metal.models.loading import read_family
from torch_q4metal.pipeline import handshake, launch
from torch_q4metal.pipeline.handshake import RankInfo, Settings, choose_split


def start(paths, settings):
    """(rank 0's model, a function that waits for the others and gives what ``serve`` gave)."""
    links = [queue.SimpleQueue() for _ in paths]
    transports = [QueueTransport(rank, links) for rank in range(len(paths))]
    ended = [None] * len(paths)

    def serve(rank):
        ended[rank] = launch.serve(transports[rank], lambda: paths[rank])

    threads = [threading.Thread(target=serve, args=(rank,)) for rank in range(1, len(paths))]
    for thread in threads:
        thread.start()

    def wait():
        for thread in threads:
            thread.join(20)
        return ended[1:]

    try:
        return launch.lead(transports[0], lambda: paths[0], settings), wait
    except Q4MetalError as error:
        error.ended = wait()
        raise


@pytest.fixture
def path(tmp_path):
    return tiny.write_tiny(tmp_path / "m", layers=4).path


@pytest.mark.parametrize("split", ["auto", "memory", "1,2,1"])
def test_three_ranks_agree(path, split, monkeypatch):
    monkeypatch.setattr(handshake, "_PROBE_BYTES", 1 << 20)
    model, wait = start([path] * 3, Settings(split=split, max_kv_size=100))
    assert model.max_kv_size == 100
    assert len(list(generate_step([1, 2, 3], model, max_tokens=5))) == 5
    layers = [range(*stage["layers"]) for stage in model.engine.stages]
    assert [layer for part in layers for layer in part] == [0, 1, 2, 3]
    model.engine.close()
    assert wait() == [True, True]


@pytest.mark.parametrize(("settings", "error", "sentence"), [
    (Settings(split="1,2,2"), Q4MetalError, "gives out 5 layers, but the model has 4"),
    (Settings(split="half"), Q4MetalError, "auto, memory, or the number of layers of each"),
    (Settings(split="2,1,1", precision="best"), Q4MetalError, "precision is 'best'"),
])  # fmt: skip
def test_what_rank_0_refuses_ends_all(path, settings, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        start([path] * 3, settings)
    assert caught.value.ended == [False, False]


def test_a_rank_without_the_model_is_named(path, tmp_path):
    with pytest.raises(PipelineError, match=r"rank 2 on .*nowhere does not exist") as caught:
        start([path, path, tmp_path / "nowhere"], Settings(split="2,1,1"))
    assert caught.value.ended == [False, False]


def test_a_rank_that_cannot_load_is_named(path, tmp_path):
    other = shutil.copytree(path, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.2" not in name}
    save_file(kept, other / "model.safetensors")
    with pytest.raises(PipelineError, match=r"rank 1 on .*model\.layers\.2") as caught:
        start([path, other], Settings(split="2,2"))
    assert caught.value.ended == [False]


def test_another_version_is_refused_with_both_values():
    infos = [RankInfo(0, "a", version="1.0"), RankInfo(1, "b", version="1.1")]
    with pytest.raises(PipelineError, match=r"rank 1 on b .*package version .*: 1\.1, not 1\.0"):
        handshake.require_equal(infos)
    infos = [RankInfo(i, "a", checks={"precision": p}) for i, p in enumerate(("fast", "int8"))]
    with pytest.raises(PipelineError, match=r"another precision .*: int8, not fast"):
        handshake.require_equal(infos)


def split_of(path, infos, **settings):
    checkpoint = Checkpoint.open(path)
    _, config = read_family(checkpoint)
    ranges = choose_split(Settings(**settings), infos, checkpoint, config, kv_bytes=1 << 20)
    return [len(part) for part in ranges]


def test_speed_and_memory_decide(tmp_path):
    path = tiny.write_tiny(tmp_path / "m", layers=12, vocab_size=260).path
    gigabytes = 1 << 30
    infos = [RankInfo(i, "a", speed=s, memory=m * gigabytes) for i, (s, m) in enumerate(
        [(1e9, 4), (3e9, 1)]
    )]  # fmt: skip
    assert split_of(path, infos, split="auto") == [3, 9]
    assert split_of(path, infos, split="memory") == [10, 2]
    small = [infos[0], RankInfo(1, "a", speed=3e9, memory=1 << 20)]
    with pytest.raises(MemoryLimitError, match="12 layers do not fit on 2 stages"):
        split_of(path, small, split="auto")
    assert split_of(path, small, split="auto", force=True) == [3, 9]
    unknown = [RankInfo(0, "a", speed=1e9), RankInfo(1, "a", speed=1e9)]
    assert split_of(path, unknown, split="auto") == [6, 6]
