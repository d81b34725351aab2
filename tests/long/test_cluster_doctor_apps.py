"""`doctor --cluster` on ranks that differ, and on those of `torch_q4metal.cluster`."""

import json
import os
import socket
import subprocess
import sys

import tiny


def test_three_ranks_of_a_cluster(ranks, tmp_path):
    """The model is on rank 0's machine alone."""
    ring = ranks(3, "doctor", "--cluster", "--threads", "1")
    path = tiny.write_tiny(tmp_path / "m", layers=5).path
    for rank in (1, 2):
        ring.start(rank)
    ring.app = (*ring.app, "--model", path)
    ring.start(0)
    status, output = ring.end(0)
    assert status == 0, ring.errors
    assert [ring.end(rank) for rank in (1, 2)] == [(0, ""), (0, "")]
    lines = output.splitlines()
    assert lines[0].split()[:5] == ["rank", "host", "device", "threads", "memory"]
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"]
    assert [line.split("rank ")[1][0] for line in lines[1:4]] == ["1", "2", "0"]
    assert lines[4].startswith("The slowest part is ")


def test_layers_that_cannot_be_given_out_come_after_the_table(ranks, tmp_path):
    path = tiny.write_tiny(tmp_path / "m", layers=1).path
    ring = ranks(2, "doctor", "--cluster", "--json", "--model", path)
    ring.start(1)
    ring.start(0)
    status, output = ring.end(0)
    assert status == 1
    found = json.loads(output)
    assert found["layers"] is None
    assert "slowest memory" in found["slowest"]
    assert "error: 2 stages are too many for a model of 1 layers" in "".join(ring.errors[0])


def test_a_chat_does_not_take_a_doctor_for_a_stage(ranks, tmp_path):
    path = tiny.write_tiny(tmp_path / "m", layers=3).path
    ring = ranks(2, "chat", "--model", path, "-p", "x")
    ring.start(0)
    ring.app = ("doctor", "--cluster")
    ring.start(1)
    assert (ring.end(0)[0], ring.end(1)[0]) == (1, 1)
    assert "it runs the doctor; start the same app" in "".join(ring.errors[0])


def test_another_version_is_named_with_exit_1():
    """By rank 0; the other one ends without a word."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ) | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }  # fmt: skip
    code = (
        "import sys, torch_q4metal\n"
        "torch_q4metal.__version__ = '9.{}'\n"
        "sys.argv = ['doctor', '--cluster']\n"
        "from torch_q4metal import cli, doctor\n"
        "cli.run(doctor.app)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(rank)], env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    (_, said), (silent, _) = outputs
    assert "error: rank 1 on" in said
    assert "another package version than rank 0" in said
    assert "9.1, not 9.0" in said
    assert not silent
