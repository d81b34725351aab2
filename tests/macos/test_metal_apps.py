"""chat and bench take the GPU of a Mac by themselves, and the CPU where they are told to."""

import json
import sys

import pytest
import speaking

from torch_q4metal import bench, chat
from torch_q4metal.chat_setup import ModelOptions, SamplingOptions, open_session


@pytest.mark.parametrize(("options", "device"), [({}, "mps"), ({"device": "cpu"}, "cpu")])
def test_a_conversation(tmp_path, mac, options, device):
    path = speaking.write_speaking(tmp_path / "model", "Paris.")
    session = open_session(ModelOptions(str(path), **options), SamplingOptions(), quiet=True)
    assert session.model.device.type == device
    for _ in range(2):  # the second turn continues what the first has cached
        assert "".join(session.ask("Which town?")) == "Paris."
    assert session.last.cached_tokens > 0


def call(monkeypatch, app, *arguments):
    monkeypatch.setattr(sys, "argv", [app.__name__, *arguments])
    app.app(standalone_mode=False)


def test_the_apps_pass_the_device_on(tmp_path, mac, monkeypatch, capsys):
    path = str(speaking.write_speaking(tmp_path / "model", "0123", endless=True))
    monkeypatch.setattr(bench, "read_probe_gb_s", lambda *threads: 10.0)
    before = mac.plan_statistics()[0]
    for app, arguments in (
        (chat, ("--prompt", "?", "-n", "3", "--quiet")),
        (bench, ("-p", "9", "-g", "3", "-n", "1", "--json")),
    ):
        call(monkeypatch, app, "--model", path, "--device", "cpu", *arguments)
        assert mac.plan_statistics()[0] == before
    capsys.readouterr()
    call(monkeypatch, chat, "--model", path, "--prompt", "?", "-n", "3", "--quiet")
    assert mac.plan_statistics()[0] > before
    assert capsys.readouterr().out == "012\n"
    call(monkeypatch, bench, "--model", path, "-p", "9", "-g", "3", "-n", "1", "--json")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["device"], result["kernels"]) == ("mps", "metal")
