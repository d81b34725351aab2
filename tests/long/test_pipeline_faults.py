"""Ranks that are lost, differ or take their time: how all others end, and how soon."""

import signal
import socket
import time

import pytest
import tiny
from faulty_ranks import TIMEOUT, Ranks, assert_all_end
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write_tiny(tmp_path_factory.mktemp("m") / "m", layers=3).path


@pytest.mark.parametrize(("number", "what"), [
    (signal.SIGKILL, "idle"), (signal.SIGSTOP, "endless"),
])  # fmt: skip
def test_a_lost_rank_ends_all_and_is_named(path, number, what, capsys):
    assert_all_end(path, number, what, capsys)


def test_rank_0_killed_ends_all(path, capsys):
    with Ranks([path] * 3) as ranks:
        assert ranks.processes[0].stdout.readline() == "ready\n"
        ranks.processes[0].kill()
        codes, _, took = ranks.ends([1, 2])
        assert codes == [1, 1]
        assert f"rank 0 on {socket.gethostname()} has ended" in ranks.processes[1].stderr.read()
    with capsys.disabled():
        print(f"\nrank 0 killed: all ended after {took:.1f} s")


def test_idle_and_a_long_chunk_outlive_the_timeout(path, capsys):
    with Ranks([path] * 2, "slow") as ranks:
        assert ranks.processes[0].stdout.readline() == "ready\n"
        time.sleep(1.5 * TIMEOUT)
        assert all(process.poll() is None for process in ranks.processes)
        ranks.processes[0].stdin.write("\n")
        ranks.processes[0].stdin.flush()
        codes, said, _ = ranks.ends([0, 1])
        assert codes == [0, 0], said
        chunk = float(ranks.processes[1].stdout.readline().split()[1])
        assert chunk > 1.5 * TIMEOUT
    with capsys.disabled():
        print(f"\nidle {1.5 * TIMEOUT:.0f} s, chunk of {chunk:.1f} s, timeout {TIMEOUT:.0f} s")


def refused(paths, precisions=None):
    begin = time.monotonic()
    with Ranks(paths, precisions=precisions) as ranks:
        codes, said, _ = ranks.ends(range(len(paths)))
        assert codes == [1] * len(paths)
        assert ranks.processes[0].stdout.read() == ""
    return said, time.monotonic() - begin


def test_another_precision_is_refused(path):
    said, _ = refused([path] * 2, ["fast", "int8"])
    assert "another precision than rank 0" in said
    assert "int8, not fast" in said


def test_other_weights_are_refused(path, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in path.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors")
    said, _ = refused([path, other])
    assert "another content of tensor model.norm.weight" in said
