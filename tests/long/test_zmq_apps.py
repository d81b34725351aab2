"""`torch_q4metal.cluster run` as people use it: a terminal, Ctrl-C, and ends that are not good."""

import json
import socket
import sys
import termios
import threading

import pexpect
import pytest
import tiny
from speaking import write_speaking

sys.path.append("tests/pipeline")
from cluster import environment, listening

CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture
def endless(tmp_path):
    return write_speaking(tmp_path / "m", "0123456789 ", endless=True, layers=3)


def terminal(ranks, home):
    """Rank 0 in a pseudo-terminal of its own."""
    program, *words = ranks.words(0)
    home_is = {"HOME": str(home), "XDG_STATE_HOME": str(home), "TERM": "xterm"}
    return pexpect.spawn(
        program, words, env=environment() | home_is, timeout=60, encoding="utf-8",
        dimensions=(40, 120),
    )  # fmt: skip


def test_ctrl_c_stops_answers_and_ctrl_d_ends_all_ranks(ranks, tmp_path, endless):
    """While it answers, every process listens on loopback alone."""
    ring = ranks(3, "chat", "--model", endless, "-n", 100000, "--threads", 1)
    child = terminal(ring, tmp_path)
    later = [ring.start(1), ring.start(2)]
    child.expect_exact(">>>")
    for _ in range(2):
        child.send("count\r")
        child.expect_exact("0123456789 012")
        for pid in (child.pid, *(process.pid for process in later)):
            assert all(each.startswith("0100007F:") for each in listening(pid))
        child.send(CTRL_C)
        child.expect_exact("(stopped; the answer is kept")
        child.expect_exact(">>>")
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)
    assert [process.wait(10) for process in later] == [0, 0]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_all_ranks_end_when_one_is_killed(ranks, tmp_path, endless, victim):
    """While it answers. Rank 0 says which it was."""
    ring = ranks(3, "chat", "--model", endless, "-n", 10**7, "--threads", 1, "-p", "x")
    processes = [ring.start(rank) for rank in range(3)]
    while "0123" not in processes[0].stdout.read(4):
        pass
    threading.Thread(target=processes[0].stdout.read).start()
    processes[victim].kill()
    for rank, process in enumerate(processes):
        if rank != victim:
            assert process.wait(15) not in (0, None)
    if victim > 0:
        assert f"rank {victim} on" in "".join(ring.errors[0])


def test_an_idle_chat_ends_when_a_rank_is_killed(ranks, tmp_path, endless):
    """By itself, and it leaves the terminal as it was."""
    ring = ranks(2, "chat", "--model", endless, "--threads", 1)
    child = terminal(ring, tmp_path)
    before = termios.tcgetattr(child.child_fd)
    later = ring.start(1)
    child.expect_exact(">>>")
    later.kill()
    child.expect_exact(f"error: rank 1 on {socket.gethostname()} has ended")
    child.expect(pexpect.EOF)
    assert termios.tcgetattr(child.child_fd) == before
    child.close()
    assert child.exitstatus == 1


def test_ctrl_c_while_waiting(ranks):
    ring = ranks(2, "chat", "-p", "x")
    first = ring.start(0)
    ring.wait_for(0, "waits for rank 1")
    first.send_signal(2)
    assert first.wait(10) == 130
    assert "Traceback" not in "".join(ring.errors[0])


def test_what_cannot_be_is_told(ranks, tmp_path):
    path = tiny.write_tiny(tmp_path / "tiny", layers=2).path
    ring = ranks(2, "chat", "--model", path, "-p", "x", "--split", "1,2")
    processes = [ring.start(rank) for rank in range(2)]
    assert [process.wait(60) for process in processes] == [1, 1]
    assert "error: --split 1,2 gives out 3 layers" in "".join(ring.errors[0])


def test_bench_with_a_batch(ranks, tmp_path):
    path = tiny.write_tiny(tmp_path / "tiny", tied=False, layers=8).path
    words = ["bench", "--model", path, "--json", "--batch", 4, "-p", 20, "-g", 6, "-n", 1]
    ring = ranks(2, *words, "--split", "3,5", "--threads", 1)
    ring.start(1)
    ring.start(0)
    status, output = ring.end(0)
    assert status == 0
    values = json.loads(output.splitlines()[-1])
    assert (values["batch"], values["ranks"]) == (4, 2)
    assert [stage["layers"] for stage in values["stages"]] == [[0, 3], [3, 8]]
