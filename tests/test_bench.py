"""bench and doctor: what they print, and that their numbers mean what they say."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from typer.testing import CliRunner

from torch_q4metal import bench, chat, doctor, ops
from torch_q4metal.cli import EXIT_USAGE
from torch_q4metal.errors import Q4MetalError
from torch_q4metal.models import load_model

PROMISED = (
    "prefill_tok_s",
    "decode_tok_s",
    "ttft_s",
    "decode_gb_s",
    "read_probe_gb_s",
    "peak_rss_bytes",
    "import_rss_bytes",
    "weight_bytes",
    "threads",
    "cpu",
)


@pytest.fixture
def small_probe(monkeypatch):
    monkeypatch.setattr(bench, "PROBE_BYTES", 8 << 20)


def test_last_line_is_one_json_object(tmp_path, small_probe):
    path = tiny.write_tiny(tmp_path / "model", tied=False).path
    words = ["--model", str(path), "-p", "20", "-g", "6", "-n", "2", "--json", "--threads", "2"]
    before = torch.get_num_threads()
    result = CliRunner().invoke(bench.app, words, catch_exceptions=False)
    torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout.splitlines()[-1])
    assert set(PROMISED) <= set(values)
    assert (values["prompt_tokens"], values["generation_tokens"], values["threads"]) == (20, 6, 2)
    assert values["prefill_tok_s"] == pytest.approx(20 / values["ttft_s"])
    expected = values["weight_bytes"] * values["decode_tok_s"] / 1e9
    assert values["decode_gb_s"] == pytest.approx(expected)
    assert values["peak_rss_bytes"] >= values["import_rss_bytes"] > 50e6
    assert values["read_probe_gb_s"] > 0.1


def test_table_without_json(tmp_path, small_probe):
    path = tiny.write_tiny(tmp_path / "model").path
    words = ["--model", str(path), "-p", "8", "-g", "4", "-n", "1", "--eager"]
    result = CliRunner().invoke(bench.app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.split()[:2] == ["model", "on"]  # not its whole path
    for title in ("prefill, 8 tokens", "decode, 4 tokens", "plain-read probe", "peak RSS"):
        assert title in result.stdout


def test_weight_bytes_are_those_that_a_token_reads(tmp_path):
    tied = load_model(tiny.write_tiny(tmp_path / "tied").path)
    assert bench.weight_bytes_per_token(tied) == tied.checkpoint.weight_bytes
    untied = load_model(tiny.write_tiny(tmp_path / "untied", tied=False).path)
    table = sum(
        info.nbytes for name, info in untied.checkpoint.tensors.items() if "embed_tokens" in name
    )
    rest = untied.checkpoint.weight_bytes - table
    assert bench.weight_bytes_per_token(untied) == rest + table // untied.config.vocab_size


def test_an_unknown_precision_is_one_sentence(tmp_path, small_probe):
    path = tiny.write_tiny(tmp_path / "model").path
    result = CliRunner().invoke(bench.app, ["--model", str(path), "--precision", "half"])
    assert isinstance(result.exception, Q4MetalError)
    assert "precision" in str(result.exception)


@pytest.mark.parametrize("app", [bench.app, chat.app], ids=["bench", "chat"])
@pytest.mark.parametrize(
    "words", [["--split", "1,1"], ["--stream-weights"], ["--stage-timeout", "30"]]
)
def test_options_of_several_ranks_are_refused_on_one(app, words):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == EXIT_USAGE
    assert f"Invalid value for {words[0]}: it is for several ranks" in result.output


@pytest.mark.parametrize("words", [["--model", "m"], ["--connect", "here:1"], ["--json"]])
def test_doctor_says_what_belongs_to_cluster(words):
    result = CliRunner().invoke(doctor.app, words)
    assert result.exit_code == EXIT_USAGE
    assert f"Invalid value for {words[0]}: it needs --cluster" in result.output


def test_doctor_lists_what_a_bug_report_needs(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = CliRunner().invoke(doctor.app, [], catch_exceptions=False)
    assert result.exit_code == 0
    for word in (
        "versions",
        "torch",
        "cpu",
        "threads",
        "kernels",
        "converted models",
        "Q4METAL_CPU",
    ):
        assert word in result.stdout
    checks = [
        line.split(maxsplit=2) for line in result.stdout.partition("\ncheck\n")[2].splitlines()
    ]
    assert {verdict for verdict, *_ in checks} == {"ok"}
    assert {kernels for _, kernels, _ in checks} == {ops.cpu_kernels()}
    for word in ("matvec", "transpose=False", "embedding", "quantize", "decode plan, fast"):
        assert any(word in rest for *_, rest in checks)
    assert "hf_secret" not in result.stdout


def test_doctor_tells_which_kernels_are_wrong(monkeypatch):
    right = ops.matmul
    monkeypatch.setattr(ops, "matmul", lambda *words: right(*words) * 1.01)
    result = CliRunner().invoke(doctor.app, [])
    assert isinstance(result.exception, Q4MetalError)  # which makes the exit status 1
    name = f"{ops.cpu_kernels()} matvec"
    assert f"5 known-answer tests failed ({name})" in str(result.exception)
    assert f"  WRONG  {name} " in result.stdout
    assert f"  ok     {ops.cpu_kernels()} embedding " in result.stdout


def test_the_read_probe_times_every_pass():
    seconds = ops.read_probe(4 << 20, 2, 3)
    assert len(seconds) == 3
    assert all(0 < s < 10 for s in seconds)


def test_kernels_that_are_not_there_are_one_sentence():
    environment = os.environ | {"Q4METAL_CPU": "none"}
    command = [sys.executable, "-m", "torch_q4metal.doctor"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: Q4METAL_CPU=none is not available here; this build ")
    assert result.stderr.count("\n") == 1
