"""`doctor --cluster`: what it shows of ranks and links, and how it ends."""

import json
import os
import socket
import subprocess
import sys

import pytest
import tiny
from torchrun import run_torchrun

from torch_q4metal.cluster_doctor import Plan, slowest, table
from torch_q4metal.pipeline.survey import LinkFacts, RankFacts

RANKS = [
    RankFacts(0, "mac1", "1", "2", "darwin", "mps", 8, 24_100_000_000, 98.3e9),
    RankFacts(1, "box", "1", "2", "linux", "cpu (avx2)", 16, None, 38e9),
]
LINKS = [LinkFacts(0, 1, 0.0004, 117.5e6), LinkFacts(1, 0, 0.0004, 12e6)]
PLAN = Plan([range(20), range(20, 28)], [3e9, 1.2e9], 3584)


def test_the_table():
    assert table(RANKS, LINKS, PLAN) == [
        "rank  host  device      threads  memory free  reads      layers  link to  round trip  "
        "throughput",
        "0     mac1  mps         8        24.1 GB      98.3 GB/s  0-19    rank 1   0.40 ms     "
        "940 Mbit/s",
        "1     box   cpu (avx2)  16       unknown      38.0 GB/s  20-27   rank 0   0.40 ms     "
        "96 Mbit/s",
    ]
    assert "  -  " in table(RANKS, LINKS, None)[1]
    one = Plan([range(27), range(27, 28)], [3e9, 1.2e9], 3584)
    assert "  27  " in table(RANKS, LINKS, one)[2]


def test_the_slowest_part():
    assert slowest(RANKS, LINKS, PLAN) == (
        "The slowest part is rank 1 on box, which reads 1.20 GB of weights a token: 31.6 of the "
        "62.6 ms that a token takes at least, which is 16 tok/s at most."
    )
    slow = [LINKS[0], LinkFacts(1, 0, 0.2, 12e6)]
    assert "slowest part is the link from rank 1 to rank 0: 100.0 of" in slowest(RANKS, slow, PLAN)
    without = slowest(RANKS, slow, None)
    assert "slowest memory is that of rank 1 on box, 38.0 GB/s" in without
    assert "slowest link is the link from rank 1 to rank 0, 200.00 ms and 96 Mbit/s" in without


def test_two_ranks_under_torchrun(tmp_path):
    path = tiny.write_tiny(tmp_path / "m", layers=5).path
    words = ["-m", "torch_q4metal.doctor", "--cluster", "--model", path, "--json"]
    done = run_torchrun(*words, processes=2)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert [one["host"] for one in found["ranks"]] == [socket.gethostname()] * 2
    assert [(one["begin"], one["end"]) for one in found["links"]] == [(0, 1), (1, 0)]
    for link in found["links"]:  # on loopback
        assert 0 < link["round_trip_s"] < 1
        assert link["bytes_s"] > 1e6
    begin, end = found["layers"]
    assert (begin[0], end[1]) == (0, 5)
    assert begin[1] == end[0]
    assert "slowest part is" in found["slowest"]


def doctor(*words):
    return subprocess.run(
        [sys.executable, "-m", "torch_q4metal.doctor", "--cluster", *words],
        capture_output=True, text=True, timeout=100,
        env=dict(os.environ) | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip


@pytest.mark.parametrize("listens", [True, False])
def test_the_way_to_rank_0_from_one_machine(listens):
    with socket.socket() as rank_0:
        rank_0.bind(("127.0.0.1", 0))
        if listens:
            rank_0.listen()
        address = f"127.0.0.1:{rank_0.getsockname()[1]}"
        done = doctor("--connect", address)
    assert "the way there  127.0.0.1 lo" in done.stdout
    if listens:
        assert (done.returncode, f"{address} answers" in done.stdout) == (0, True)
    else:
        assert done.returncode == 1
        assert f"error: {address} refuses the connection: nothing listens there" in done.stderr


def test_alone_it_says_how_it_is_started():
    done = doctor()
    assert done.returncode == 2
    assert "torchrun or" in done.stderr
    assert "--connect HOST:PORT" in done.stderr
