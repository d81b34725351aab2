"""`python -m torch_q4metal.cluster`: its key, its processes, and what they listen on."""

import re
import stat
import subprocess

import pytest
import tiny
from cluster import WORDS, Ranks, environment, listening
from typer.testing import CliRunner
from zmq_ring import new_key

from torch_q4metal.chat_setup import ModelOptions, SamplingOptions, open_session
from torch_q4metal.cluster import app
from torch_q4metal.errors import PipelineError
from torch_q4metal.pipeline.key_file import read_key, write_key
from torch_q4metal.pipeline.zmq_transport import ZmqTransport

LOOPBACK = "0100007F"


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_keygen_writes_a_key_for_its_owner_alone(tmp_path):
    file = tmp_path / "cluster.key"
    assert run("keygen", file).exit_code == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    key = read_key(file)
    assert len(key.public) == len(key.secret) == 40
    assert key.secret.decode() in file.read_text()
    assert key.secret.decode() not in repr(key)


def test_keygen_overwrites_nothing(tmp_path):
    file = tmp_path / "cluster.key"
    write_key(file)
    before = file.read_text()
    assert "exists already" in str(run("keygen", file).exception)
    assert file.read_text() == before
    with pytest.raises(PipelineError, match="cannot be written: No such file or directory"):
        write_key(tmp_path / "nowhere" / "key")


def test_keys_that_are_none(tmp_path):
    file = tmp_path / "cluster.key"
    with pytest.raises(PipelineError, match=r"cannot be read: No such file.*keygen"):
        read_key(file)
    write_key(file)
    file.chmod(0o640)
    with pytest.raises(PipelineError, match=f"other users .* chmod 600 {file}"):
        read_key(file)
    file.chmod(0o600)
    for text in (b"", b"hello\n", b"\xff" * 40, b'"' * 40):
        file.write_bytes(text)
        with pytest.raises(PipelineError, match="holds no key"):
            read_key(file)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--rank", "2"], "ranks of 2 are 0 to 1"),
        (["--bind", "127.0.0.1", "--interface", "lo"], "--bind names an address already"),
        (["--rank", "1", "--interface", "en9"], "--interface en9 has no IPv4 address here; there"),
        (["--connect", "here"], "--connect is HOST:PORT, like 192.168.1.10:29400, not 'here'"),
        (["--", "convert"], "it starts with chat, bench or doctor, not convert"),
    ],
)
def test_command_lines_that_cannot_be(tmp_path, words, text):
    write_key(tmp_path / "k")
    usual = ["--rank", 0, "--world-size", 2, "--connect", "127.0.0.1:29400"]
    command = [] if words[0] == "--" else ["--", "chat"]
    done = run("run", *usual, "--key", tmp_path / "k", *words, *command)
    assert done.exit_code != 0
    assert text in " ".join((done.output + str(done.exception)).replace("│", " ").split())


def test_three_processes(tmp_path):
    """While they wait they listen on loopback alone; the text is that of one
    process; a rank with another key is refused, told and logged; all end with rank 0."""
    path = tiny.write_tiny(tmp_path / "m", "qwen2", layers=4).path
    write_key(tmp_path / "key")
    words = ["chat", "--model", path, "-p", "hello", "-n", "12", "--threads", "1"]
    ranks = Ranks(tmp_path / "key", 3, *words)
    try:
        first = ranks.start(0)
        ranks.wait_for(0, f"rank 0 listens on {ranks.address} and waits for rank 1, 2")
        middle = ranks.start(1)
        ranks.wait_for(0, "waits for rank 2")
        for process in (first, middle):
            (found,) = listening(process.pid)
            assert found.split(":")[0] == LOOPBACK
        with pytest.raises(PipelineError, match="does not take this rank's key"):
            ZmqTransport(2, 3, ranks.address, new_key(), join_timeout=20)
        # Its address is part of it unless libzmq closed the connection before it could be read.
        ranks.wait_for(0, ": it has another key or none")
        said = "".join(ranks.errors[0])
        assert re.search(r"refused a connection( from 127\.0\.0\.1)?: it has another key", said)
        ranks.start(2)
        session = open_session(
            ModelOptions(str(path)), SamplingOptions(), max_tokens=12, quiet=True
        )
        expected = "".join(session.ask("hello"))
        status, output = ranks.end(0)
        assert (status, output) == (0, expected + "\n"), ranks.errors
        assert [ranks.end(rank) for rank in (1, 2)] == [(0, ""), (0, "")]
    finally:
        ranks.kill()


def test_help_is_quick_and_needs_no_torch():
    code = "import sys, torch_q4metal.cluster as c; assert 'zmq' not in sys.modules"
    done = subprocess.run(
        [WORDS[0], "-c", f"import sys; sys.argv=['-m']; sys.orig_argv=['torch_q4metal.x']; {code};"
         "assert 'torch' not in sys.modules"],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
