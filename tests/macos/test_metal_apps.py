"""chat and bench take the GPU of a Mac by themselves, and the CPU where they are told to."""

import json
import sys

import pytest
import speaking
import torch

from torch_q4metal import bench, chat, doctor, mac_kernels
from torch_q4metal.chat_setup import ModelOptions, SamplingOptions, open_session
from torch_q4metal.machine import peak_rss


@pytest.mark.parametrize(("options", "device"), [({}, "mps"), ({"device": "cpu"}, "cpu")])
def test_a_conversation(tmp_path, mac, options, device):
    path = speaking.write_speaking(tmp_path / "model", "Paris.")
    session = open_session(ModelOptions(str(path), **options), SamplingOptions(), quiet=True)
    assert session.model.device.type == device
    for _ in range(2):  # the second turn continues what the first has cached
        assert "".join(session.ask("Which town?")) == "Paris."
    assert session.last.cached_tokens > 0


def kernels_since(mac, count):
    return {name for name, *_ in mac.dispatches()[count:]}


def call(monkeypatch, app, *arguments):
    monkeypatch.setattr(sys, "argv", [app.__name__, *arguments])
    app.app(standalone_mode=False)


def test_the_apps_pass_the_device_on(tmp_path, mac, monkeypatch, capsys):
    path = str(speaking.write_speaking(tmp_path / "model", "0123", endless=True))
    monkeypatch.setattr(bench, "PROBE_BYTES", 8 << 20)
    monkeypatch.setattr(bench, "_PROBE_ROUNDS", 1)
    monkeypatch.setattr(mac_kernels, "COLD_BYTES", 1 << 16)
    before, dispatches = mac.plan_statistics()[0], len(mac.dispatches())
    for app, arguments in (
        (chat, ("--prompt", "?", "-n", "3", "--quiet")),
        (bench, ("-p", "9", "-g", "3", "-n", "1", "--json")),
    ):
        call(monkeypatch, app, "--model", path, "--device", "cpu", *arguments)
        assert mac.plan_statistics()[0] == before
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["gpu_bytes"] == 0
    assert "read_probe" not in kernels_since(mac, dispatches)
    call(monkeypatch, chat, "--model", path, "--prompt", "?", "-n", "3", "--quiet")
    assert mac.plan_statistics()[0] > before
    assert capsys.readouterr().out == "012\n"
    before = len(mac.dispatches())
    call(monkeypatch, bench, "--model", path, "-p", "9", "-g", "3", "-n", "1", "--json")
    assert "read_probe" in kernels_since(mac, before)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["device"], result["kernels"]) == ("mps", "metal")
    assert result["gpu_bytes"] > result["file_bytes"]
    assert result["peak_memory_bytes"] == result["peak_rss_bytes"] + result["gpu_bytes"]


def test_the_bench_says_what_it_counts(tmp_path, mac, monkeypatch, capsys):
    path = str(speaking.write_speaking(tmp_path / "model", "0123", endless=True))
    monkeypatch.setattr(bench, "read_probe_gb_s", lambda threads, device: 10.0)
    call(monkeypatch, bench, "--model", path, "-p", "9", "-g", "3", "-n", "1")
    table = capsys.readouterr().out
    for title in (
        "plain-read probe of the GPU",
        "buffers of the GPU",
        "peak RSS and these buffers",
    ):
        assert title in table


def test_peak_memory_counts_the_buffers_of_the_gpu(tmp_path, mac):
    path = speaking.write_speaking(tmp_path / "model", "Paris.")
    session = open_session(ModelOptions(str(path)), SamplingOptions(), quiet=True)
    before = peak_rss()
    assert "".join(session.ask("Which town?")) == "Paris."
    added = session.last.peak_memory - before
    assert added >= torch.mps.driver_allocated_memory() >= session.model.checkpoint.weight_bytes


def test_the_doctor_names_the_gpu(mac):
    rows = dict(doctor.device())
    assert ", macOS " in rows["mps"]
    assert rows["mps memory"].endswith(" GB available")
