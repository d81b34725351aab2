"""Downloads against a stand-in hub (hub_server.py): whole, cut off, refused, out of space, offline.

Each run is a process of its own, as for a user: huggingface_hub reads its settings when imported.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, Repo
from sentence import assert_one_sentence

import torch_q4metal
from torch_q4metal.errors import HubError
from torch_q4metal.hub import resolve_model
from torch_q4metal.hub_download import CHUNK

ID = "org/tiny-4bit"
# A user's process: a request on each line of stdin, an answer on each line of stdout. It takes the
# modules without the package's __init__, which would import torch.
DRIVER = """
import contextlib, errno, importlib, io, json, logging, pathlib, resource, shutil, sys, types
from unittest import mock
package = types.ModuleType("torch_q4metal")
package.__path__ = [sys.argv[1]]
sys.modules["torch_q4metal"] = package
hub = importlib.import_module("torch_q4metal.hub")
download = importlib.import_module("torch_q4metal.hub_download")
download._PAUSES = (0.01, 0.01, 0.01)
assert not {"torch", "huggingface_hub"} & set(sys.modules)

class FullDisk(io.FileIO):
    room = 0
    def write(self, data):
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)

@contextlib.contextmanager
def faults(free=None, largest_file=None, room=None):
    with contextlib.ExitStack() as stack:
        if free is not None:
            usage = mock.Mock(free=free)
            stack.enter_context(mock.patch("shutil.disk_usage", return_value=usage))
        if largest_file is not None:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
            stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        if room is not None:
            FullDisk.room, plain = room, pathlib.Path.open
            def full(path, mode="r", *rest, **options):
                return FullDisk(path, mode) if mode == "ab" else plain(path, mode, *rest, **options)
            stack.enter_context(mock.patch.object(pathlib.Path, "open", full))
        yield

for line in sys.stdin:
    request = json.loads(line)
    said = io.StringIO()
    logging.basicConfig(level="INFO", format="%(message)s", stream=said, force=True)
    answer = {}
    with faults(**request.pop("fault", {})):
        try:
            answer["folder"] = str(hub.resolve_model(**request))
        except hub.HubError as error:
            answer["error"] = str(error)
    print(json.dumps(answer | {"said": said.getvalue()}), flush=True)
assert "torch" not in sys.modules
"""


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def two_shards() -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "llama"}',
        "model-00001-of-00002.safetensors": noise(3_500_000, 1),
        "model-00002-of-00002.safetensors": noise(1_500_000, 2),
        "model.safetensors.index.json": b"{}",
        "tokenizer.json": b'{"text": "%s"}' % (b"x" * 2000),
        "additional_chat_templates/tool_use.jinja": b"{{ messages }}",
        "README.md": b"# not wanted",
        "modeling.py": b"raise SystemExit('remote code')",
        "pytorch_model.bin": noise(2000, 3),
    }


SHARD = "model-00001-of-00002.safetensors"
WANTED = set(two_shards()) - {"README.md", "modeling.py", "pytorch_model.bin"}


class User:
    """A home directory and a hub to download from; ``run`` uses one process for each ``env``."""

    def __init__(self, home: Path, hub: HubServer) -> None:
        self.home, self.hub = home, hub
        self._running: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> "User":
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def start(self, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        settings = {"HF_HOME": str(self.home), "HF_ENDPOINT": self.hub.url} | (env or {})
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, torch_q4metal.__path__[0]],
            env=clean | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, process: subprocess.Popen[str], **request: Any) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"path_or_id": ID} | request) + "\n")
        process.stdin.flush()

    def run(self, env: dict[str, str] | None = None, **request: Any) -> dict[str, Any]:
        key = json.dumps(env)
        if key not in self._running:
            self._running[key] = self.start(env)
        process = self._running[key]
        self.ask(process, **request)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            pytest.fail(process.communicate()[1])
        answer: dict[str, Any] = json.loads(line)
        return answer

    def leave(self) -> None:
        """End the processes, so that the next run is a new one."""
        for process in self._running.values():
            _, err = process.communicate(timeout=30)
            assert process.returncode == 0, err
        self._running.clear()

    def error(self, *words: str, **request: Any) -> None:
        answer = self.run(**request)
        assert "error" in answer, answer
        assert_one_sentence(answer["error"], *words)

    def blobs(self) -> list[str]:
        folder = self.home / "hub" / ("models--" + ID.replace("/", "--")) / "blobs"
        return sorted(path.name for path in folder.glob("*"))


def assert_whole(folder: str, files: dict[str, bytes]) -> None:
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }
    assert found == {name: files[name] for name in WANTED}


def test_two_shards_then_online_again_then_offline(tmp_path):
    files = two_shards()
    with HubServer({ID: Repo(files)}) as hub, User(tmp_path, hub) as user:
        first = user.run()
        assert_whole(first["folder"], files)
        size = sum(len(files[name]) for name in WANTED)
        assert f"{ID}: {len(WANTED)} files, {size / 1e6:.2f} MB to download" in first["said"]
        assert hub.served == {name: len(files[name]) for name in WANTED}

        hub.forget()
        user.leave()
        again = user.run()
        assert again["folder"] == first["folder"]
        assert "to download" not in again["said"]
        assert hub.served == {}
        assert [path for _, path, _ in hub.log if ID in path] == [f"/api/models/{ID}"]

        hub.forget()
        assert user.run(offline=True)["folder"] == first["folder"]
        assert user.run({"HF_HUB_OFFLINE": "1"})["folder"] == first["folder"]
        assert hub.log == []
        # The hub can't be reached any more: what is in the cache still works.
        hub.stop()
        assert user.run()["folder"] == first["folder"]


def test_a_killed_download_goes_on_where_it_ended(tmp_path):
    files = two_shards()
    with (
        HubServer({ID: Repo(files, cut_at={SHARD: 3_000_000}, hang=True)}) as hub,
        User(tmp_path, hub) as user,
    ):
        process = user.start()
        user.ask(process)
        assert hub.reached_cut.wait(30)
        partial = 2 * CHUNK
        for _ in range(200):  # what the server has sent still has to be written
            kept = [path for path in tmp_path.rglob("*.incomplete") if "blobs" in path.parts]
            if any(path.stat().st_size >= partial for path in kept):
                break
            time.sleep(0.02)
        process.kill()
        process.communicate()
        user.error(ID, "only partly in the cache", str(tmp_path), offline=True)

        hub.forget()
        answer = user.run()
        assert_whole(answer["folder"], files)
        ranges = [asked for method, path, asked in hub.log if path.endswith(SHARD) and asked]
        assert ranges == [f"bytes={partial}-"]
        assert hub.served[SHARD] == len(files[SHARD]) - partial
        assert "of it are here already" in answer["said"]
        assert not [name for name in user.blobs() if name.endswith(".incomplete")]


def test_ctrl_c_ends_soon_and_keeps_what_there_is(tmp_path):
    with (
        HubServer({ID: Repo(two_shards(), cut_at={SHARD: 3_000_000}, hang=True)}) as hub,
        User(tmp_path, hub) as user,
    ):
        process = user.start({"HF_HUB_DOWNLOAD_TIMEOUT": "1"})
        user.ask(process)
        assert hub.reached_cut.wait(30)
        for _ in range(500):  # what the server has sent still has to be written
            if any(name.endswith(".incomplete") for name in user.blobs()):
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert process.returncode != 0
        assert "KeyboardInterrupt" in err
        assert [name for name in user.blobs() if name.endswith(".incomplete")]


def test_a_connection_that_breaks_is_taken_up_again(tmp_path):
    files = two_shards()
    with (
        HubServer({ID: Repo(files, cut_at={SHARD: 2_500_000}, failures=2)}) as hub,
        User(tmp_path, hub) as user,
    ):
        assert_whole(user.run()["folder"], files)
        ranges = [asked for _, path, asked in hub.log if path.endswith(SHARD) and asked]
        assert ranges[0] == "bytes=0-"
        assert ranges[-1] == f"bytes={2 * CHUNK}-"


def test_a_connection_that_stays_broken_is_one_sentence(tmp_path):
    files = two_shards()
    with (
        HubServer({ID: Repo(files, cut_at={SHARD: 0}, cuts=99)}) as hub,
        User(tmp_path, hub) as user,
    ):
        user.error("connection broke", SHARD, "3.50 MB", "run the same command again")
        user.error("only partly", offline=True)
        hub.repos[ID].cuts = 0
        assert_whole(user.run()["folder"], files)


def test_a_server_without_ranges_sends_all_again(tmp_path):
    files = two_shards()
    with (
        HubServer({ID: Repo(files, cut_at={SHARD: 2_500_000}, ranges=False)}) as hub,
        User(tmp_path, hub) as user,
    ):
        assert_whole(user.run()["folder"], files)


def test_a_damaged_file_does_not_stay(tmp_path):
    files = two_shards()
    with HubServer({ID: Repo(files, damage=True)}) as hub, User(tmp_path, hub) as user:
        user.error(ID, "arrived damaged", "again")
        hub.repos[ID].damage = False
        assert_whole(user.run()["folder"], files)


def test_revisions(tmp_path):
    old, new = two_shards(), two_shards() | {SHARD: noise(5000, 9)}
    with (
        HubServer({ID: Repo(old, commit="b" * 40, revisions=("v1",))}) as hub,
        User(tmp_path, hub) as user,
    ):
        assert_whole(user.run(revision="v1")["folder"], old)
        hub.repos[ID] = Repo(new)
        user.error(ID, "no revision v2", revision="v2")
        answer = user.run()
        assert_whole(answer["folder"], new)
        assert "6 files" in answer["said"]
        assert_whole(user.run(revision="v1", offline=True)["folder"], old)
        user.error(ID, "revision v3", "not in the cache", revision="v3", offline=True)


def test_access(tmp_path):
    files = two_shards()
    repos = {ID: Repo(files, token="hf_secret"), "org/gguf": Repo({"model.gguf": b"GGUF"})}
    with HubServer(repos) as hub, User(tmp_path, hub) as user:
        user.error(ID, "gated", f"{hub.url}/{ID}", "HF_TOKEN")
        assert_whole(user.run({"HF_TOKEN": "hf_secret"})["folder"], files)
        missing = "org/no-such-model"
        for env in ({}, {"HF_TOKEN": "hf_secret"}):  # 401 and 404
            user.error("neither a folder", missing, hub.url, env=env, path_or_id=missing)
        user.error("no model*.safetensors", "model.gguf", path_or_id="org/gguf")


def test_no_space(tmp_path):
    files = two_shards()
    size = sum(len(files[name]) for name in WANTED)
    with HubServer({ID: Repo(files)}) as hub, User(tmp_path, hub) as user:
        user.error(ID, f"{size / 1e6:.2f} MB", "2.00 MB are free", fault={"free": 2_000_000})
        assert hub.served == {}
        user.error(ID, "disk is full", "run again", fault={"room": 1_500_000})
        user.error("takes no files of that size", fault={"largest_file": 2_500_000})
        user.error("only partly", offline=True)
        hub.forget()
        answer = user.run()
        assert_whole(answer["folder"], files)
        assert hub.served[SHARD] < len(files[SHARD])  # what had been written was kept


def test_neither_hub_nor_cache(tmp_path):
    with HubServer({}) as hub, User(tmp_path, hub) as user:
        hub.stop()
        user.error(ID, hub.url, "can't be reached", str(tmp_path))
        user.error(ID, "not in the cache", str(tmp_path / "hub"), offline=True)
        assert not user.blobs()


def test_a_snapshot_without_all_shards_is_not_whole(tmp_path):
    """As another program leaves it that fetches single files and writes no list of them."""
    snapshot = tmp_path / "hub" / "models--org--tiny-4bit" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    with HubServer({}) as hub, User(tmp_path, hub) as user:
        (snapshot / "config.json").write_text("{}")
        user.error("only partly", offline=True)
        (snapshot / SHARD).write_text("")
        user.error("only partly", offline=True)
        (snapshot / SHARD.replace("00001", "00002", 1)).write_text("")
        assert user.run(offline=True)["folder"] == str(snapshot)


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch, caplog):
    assert resolve_model(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_model("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org") == tmp_path / "org"
    assert resolve_model(tmp_path, revision="v1") == tmp_path
    assert "v1" in caplog.text


@pytest.mark.parametrize(
    "given", ["/no/such", "./no", "../no", "~/no", "a/b/c", "no/", "", "a b", "org/na me", "x--y"]
)
def test_no_folder_and_no_id(given):
    with pytest.raises(HubError) as caught:
        resolve_model(given)
    assert_one_sentence(caught.value, given)


def test_files_are_no_models(tmp_path):
    for name, word in (("model.gguf", "torch_q4metal.convert"), ("model.safetensors", "folder")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(HubError) as caught:
            resolve_model(tmp_path / name)
        assert_one_sentence(caught.value, name, word)
