"""A rank that is killed or stopped: how all others end, and how soon. tests/long has the rest."""

import os
import signal
import socket
import time

import pytest
import tiny
from faulty_ranks import TIMEOUT, Ranks


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write_tiny(tmp_path_factory.mktemp("m") / "m", layers=3).path


@pytest.mark.parametrize(("number", "what"), [
    (signal.SIGKILL, "endless"), (signal.SIGSTOP, "idle"),
])  # fmt: skip
def test_a_lost_rank_ends_all_and_is_named(path, number, what, capsys):
    with Ranks([path] * 3, what) as ranks:
        if what == "endless":
            ranks.go()
        else:
            assert ranks.processes[0].stdout.readline() == "ready\n"
        time.sleep(0.3)
        os.kill(ranks.processes[1].pid, number)
        codes, said, took = ranks.ends([0, 2])
        assert codes == [1, 1]
        words = "has not answered for 2 s" if number == signal.SIGSTOP else "has ended"
        assert said.count("error:") == 1
        assert f"error: rank 1 on {socket.gethostname()} {words}" in said
        assert took < TIMEOUT + 3
    with capsys.disabled():
        print(f"\n{signal.Signals(number).name} while {what}: all ended after {took:.1f} s")
