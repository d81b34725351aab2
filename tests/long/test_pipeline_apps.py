"""The apps on two ranks that the real torchrun starts: what they print, and how they end."""

import json
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pexpect
import tiny
from speaking import write_speaking
from torchrun import Terminal, run_torchrun

LONG = {"config": {"max_position_embeddings": 2048}, "layers": 8}


def test_chat_and_its_statistics(tmp_path):
    """One answer on stdout, from rank 0 alone; what is piped in is read by rank 0 alone."""
    path = tiny.write_tiny(tmp_path / "m", "qwen2", **LONG).path
    words = ["-m", "torch_q4metal.chat", "--model", path, "-n", "12", "--json"]
    done = run_torchrun(*words, processes=2, text="hello there\n")
    assert done.returncode == 0, done.stderr
    alone = subprocess.run(
        [sys.executable, *map(str, words)], input="hello there\n", capture_output=True, text=True
    )
    assert json.loads(done.stdout)["text"] == json.loads(alone.stdout)["text"]
    assert json.loads(done.stdout)["completion_tokens"] == 12


def test_bench_with_a_batch(tmp_path):
    path = tiny.write_tiny(tmp_path / "m", tied=False, **LONG).path
    words = ["-m", "torch_q4metal.bench", "--model", path, "--json", "--batch", "4"]
    done = run_torchrun(*words, "-p", "20", "-g", "6", "-n", "1", "--split", "3,5", processes=2)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert (values["batch"], values["ranks"]) == (4, 2)
    assert [stage["layers"] for stage in values["stages"]] == [[0, 3], [3, 8]]
    assert values["file_bytes"] == sum(stage["weight_bytes"] for stage in values["stages"])


def test_what_cannot_be_is_told_once(tmp_path):
    path = tiny.write_tiny(tmp_path / "m", layers=2).path
    words = ["-m", "torch_q4metal.chat", "--model", path, "-p", "x", "--split", "1,2"]
    done = run_torchrun(*words, processes=2)
    assert done.returncode == 1
    assert done.stderr.count("error: --split 1,2 gives out 3 layers") == 1
    assert not done.stdout


def test_a_killed_chat_leaves_the_terminal_as_it_was(tmp_path):
    model = write_speaking(tmp_path / "m", "0123456789 ", endless=True, layers=2)
    terminal = Terminal(tmp_path, model)
    terminal.expect(">>>")
    terminal.send("count\r")
    terminal.expect("0123456789 012")
    assert not termios.tcgetattr(terminal.child.child_fd)[3] & termios.ISIG
    os.kill(_rank_0(terminal.child.pid), signal.SIGKILL)
    terminal.child.expect(pexpect.EOF)
    terminal.wait_restored()
    terminal.child.close()
    assert terminal.child.exitstatus == 1


def _rank_0(torchrun: int) -> int:
    """The process of rank 0 among torchrun's children."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    return next(
        int(child)
        for child in children
        if b"\0RANK=0\0" in Path(f"/proc/{child}/environ").read_bytes()
    )
