"""chat and bench take the GPU of a Mac by themselves, and the CPU where they are told to."""

import json
import os
import sys

import cross_compiler
import pytest
import speaking
import torch

from torch_q4metal import bench, chat, doctor, mac_kernels, machine, memory
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
    beside = result["peak_memory_bytes"] - result["peak_rss_bytes"] - result["gpu_bytes"]
    assert 0 <= beside < 1 << 20  # what the process took until it was asked again


def test_the_bench_says_what_it_counts(tmp_path, mac, monkeypatch, capsys):
    path = str(speaking.write_speaking(tmp_path / "model", "0123", endless=True))
    monkeypatch.setattr(bench, "read_probe_gb_s", lambda threads, device: 10.0)
    call(monkeypatch, bench, "--model", path, "-p", "9", "-g", "3", "-n", "1")
    table = capsys.readouterr().out
    for title in (
        "plain-read probe of the GPU",
        "buffers of the GPU",
        "peak memory with these buffers",
    ):
        assert title in table


def test_peak_memory_counts_the_buffers_of_the_gpu(tmp_path, mac):
    path = speaking.write_speaking(tmp_path / "model", "Paris.")
    session = open_session(ModelOptions(str(path)), SamplingOptions(), quiet=True)
    before = peak_rss()
    assert "".join(session.ask("Which town?")) == "Paris."
    added = session.last.peak_memory - before
    assert added >= torch.mps.driver_allocated_memory() >= session.model.checkpoint.weight_bytes


def test_peak_memory_is_what_macos_counts(monkeypatch):
    """Where it tells, at the place in its struct that Apple's header says."""

    class Library:
        failed = 0

        def __init__(self, name):
            assert name is None

        def proc_pid_rusage(self, process, flavor, usage):
            assert (process, flavor) == (os.getpid(), machine.RUSAGE_INFO_V4)
            usage._obj[machine.PEAK_FOOTPRINT] = 5 << 30
            return Library.failed

    monkeypatch.setattr(memory, "peak_rss", lambda: 1000)
    monkeypatch.setattr(memory, "gpu_bytes", lambda device: 20)
    assert memory.peak_memory(torch.device("mps")) == 1020
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine.ctypes, "CDLL", Library)
    assert memory.peak_memory(torch.device("mps")) == 5 << 30
    assert memory.peak_memory(torch.device("cpu")) == 1020
    Library.failed = -1
    assert memory.peak_memory(torch.device("mps")) == 1020


def test_where_macos_tells_the_peak(tmp_path):
    def complaint(field):
        source = tmp_path / f"{field}.mm"
        source.write_text(
            "#include <stddef.h>\n#include <sys/resource.h>\n"
            f"static_assert(RUSAGE_INFO_V4 == {machine.RUSAGE_INFO_V4});\n"
            f"static_assert(sizeof(rusage_info_v4) == 8 * {machine.RUSAGE_WORDS});\n"
            f"static_assert(offsetof(rusage_info_v4, {field}) == 8 * {machine.PEAK_FOOTPRINT});\n"
        )
        return cross_compiler.check_syntax(source, "-std=c++20")

    assert complaint("ri_lifetime_max_phys_footprint") == ""
    assert "static assertion failed" in complaint("ri_phys_footprint")


def test_the_doctor_names_the_gpu(mac):
    rows = dict(doctor.device())
    assert ", macOS " in rows["mps"]
    assert rows["mps memory"].endswith(" GB available")
