"""Ranks that are lost, differ or take their time, in both starts: how all others end, how soon."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import tiny
from faulty_ranks import STARTS, TIMEOUT, Ranks, assert_all_end, assert_refused
from safetensors.torch import load_file, save_file
from speaking import write_speaking
from torchrun import start_torchrun

sys.path.append("tests/pipeline")
from cluster import Ranks as ClusterRanks

from torch_q4metal.pipeline.key_file import write_key


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write_tiny(tmp_path_factory.mktemp("m") / "m", layers=3).path


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("what", ["idle", "endless"])
def test_a_lost_rank_ends_all_and_is_named(path, number, what, start, capsys):
    assert_all_end(path, number, what, start, capsys)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_rank_0_all_end(path, start, number, capsys):
    with Ranks([path] * 3, "idle", start) as ranks:
        ranks.wait_until_ready()
        os.kill(ranks.processes[0].pid, number)
        begin = time.monotonic()
        codes = [process.wait(60) for process in ranks.processes[1:]]
        took = time.monotonic() - begin
        assert codes == [1, 1]
        assert f"rank 0 on {socket.gethostname()} has" in ranks.processes[1].stderr.read()
        assert took < TIMEOUT + 3
    with capsys.disabled():
        print(f"\n{start}: rank 0, {signal.Signals(number).name}: all ended after {took:.1f} s")


@pytest.mark.parametrize("start", STARTS)
def test_idle_and_a_long_chunk_outlive_the_timeout(path, start, capsys):
    with Ranks([path] * 2, "slow", start) as ranks:
        ranks.wait_until_ready()
        time.sleep(1.5 * TIMEOUT)
        assert all(process.poll() is None for process in ranks.processes)
        ranks.processes[0].stdin.write("\n")
        ranks.processes[0].stdin.flush()
        codes, said, _ = ranks.ends([0, 1])
        assert codes == [0, 0], said
        chunk = float(ranks.processes[1].stdout.readline().split()[1])
        assert chunk > 1.2 * TIMEOUT
    with capsys.disabled():
        print(f"\n{start}: idle {1.5 * TIMEOUT:.1f} s, chunk {chunk:.1f} s of {TIMEOUT:.0f}")


# ---- the same through what people type: --stage-timeout, torchrun and its agent


@pytest.fixture
def endless(tmp_path):
    return write_speaking(tmp_path / "m", "0123456789 ", endless=True, layers=3)


def words(model):
    return ["--model", str(model), "-n", "10000000", "--threads", "1", "-p", "x",
            "--stage-timeout", "4"]  # fmt: skip


def until_it_answers(process):
    while "0123" not in process.stdout.read(4):
        assert process.poll() is None
    os.set_blocking(process.stdout.fileno(), False)  # what follows is not read


def test_torchrun_ends_when_a_rank_stops(endless, capsys):
    torchrun = start_torchrun("-m", "torch_q4metal.chat", *words(endless), processes=3)
    try:
        until_it_answers(torchrun)
        ranks = children(torchrun.pid)
        os.kill(ranks[1], signal.SIGSTOP)
        begin = time.monotonic()
        until_gone([ranks[0], ranks[2]])
        took = time.monotonic() - begin
        assert torchrun.wait(60) == 1
        whole = time.monotonic() - begin
        assert f"error: rank 1 on {socket.gethostname()} has not" in torchrun.stderr.read()
        until_gone(ranks)
        assert took < 4 + 3
    finally:
        torchrun.kill()
        torchrun.communicate()
    with capsys.disabled():
        print(f"\ntorchrun: SIGSTOP, --stage-timeout 4: ranks {took:.1f} s, torchrun {whole:.1f} s")


def test_cluster_run_ends_when_a_rank_stops(endless, tmp_path, capsys):
    write_key(tmp_path / "key")
    ring = ClusterRanks(tmp_path / "key", 3, "chat", *words(endless))
    try:
        processes = [ring.start(rank) for rank in range(3)]
        until_it_answers(processes[0])
        processes[1].send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        assert [processes[rank].wait(30) for rank in (0, 2)] == [1, 1]
        took = time.monotonic() - begin
        assert f"error: rank 1 on {socket.gethostname()} has not" in "".join(ring.errors[0])
        assert took < 4 + 3
    finally:
        ring.kill()
    with capsys.disabled():
        print(f"\ncluster run: SIGSTOP, --stage-timeout 4: all ended after {took:.1f} s")


def children(torchrun):
    """The pids of torchrun's workers, by rank."""
    pids = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    found = {}
    for pid in map(int, pids):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(e[5:]): pid for e in environment if e.startswith(b"RANK=")}
    return [found[rank] for rank in sorted(found)]


def until_gone(pids):
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- ranks that differ


@pytest.fixture
def other(path, tmp_path):
    """A copy of the checkpoint, to be changed."""
    folder = tmp_path / "other"
    folder.mkdir()
    for file in path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("start", STARTS)
def test_another_precision_is_refused(path, start):
    sentences = "another precision than rank 0", "int8, not fast"
    assert_refused([path] * 2, start, *sentences, precisions=["fast", "int8"])


@pytest.mark.parametrize("start", STARTS)
def test_another_version_is_refused(path, start):
    sentences = "another package version than rank 0", "9.8, not 9.9"
    assert_refused([path] * 2, start, *sentences, versions=["9.9", "9.8"])


@pytest.mark.parametrize("start", STARTS)
def test_other_weights_are_refused(path, other, start):
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors")
    sentence = "another content of tensor model.norm.weight (hash of 64 bytes) than rank 0"
    assert_refused([path, other], start, sentence)


@pytest.mark.parametrize("start", STARTS)
def test_other_tensor_headers_are_refused(path, other, start):
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, other / "model.safetensors")
    width = len(tensors["model.norm.weight"])
    sentences = "another tensor model.norm.weight than", f"BF16 [{width}], not F32 [{width}]"
    assert_refused([path, other], start, *sentences)


@pytest.mark.parametrize("start", STARTS)
def test_another_config_is_refused(path, other, start):
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    sentences = "another rms_norm_eps in config.json than", f"0.5, not {config['rms_norm_eps']}"
    assert_refused([path, other], start, *sentences)


@pytest.mark.parametrize("start", STARTS)
def test_another_tokenizer_is_refused(path, other, start):
    file = other / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert_refused([path, other], start, "another tokenizer (its SHA-256) than rank 0")
