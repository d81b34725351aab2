"""The README's predicted numbers, their formula, and what is made of measured ones."""

from pathlib import Path

import pytest
import torch
from sentence import assert_one_sentence
from typer.testing import CliRunner

from torch_q4metal import bench, bench_mac, predictions
from torch_q4metal.errors import Q4MetalError
from torch_q4metal.model_shapes import MODELS
from torch_q4metal.predictions import Span, chip_of

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_has_the_tables():
    assert predictions.markdown() in README.read_text()


def test_an_m5_max_is_between_half_of_mlxs_overhead_and_the_dispatches():
    chip, model = chip_of("Apple M5 Max", 40), MODELS[3]
    assert model.name == "Qwen2.5-7B"
    assert model.weight_bytes == pytest.approx(3.978e9, rel=1e-3)
    assert predictions.dispatches_of(model) == 143
    seconds = 3.978 / 558.7
    span = predictions.tok_s(model, chip.stream, chip.dispatch)
    assert span.high == pytest.approx(1 / (seconds + 143 * 2.05e-6), rel=1e-3)
    assert span.low == pytest.approx(1 / (seconds + 143 * 3.4e-6), rel=1e-3)


def test_chips_that_differ_in_cores_are_told_apart():
    assert chip_of("Apple M4 Max", 32).gb_s == 410
    assert chip_of("Apple M4 Max", 40).gb_s == 546
    assert chip_of("Apple M4 Max", 99) is None
    assert chip_of("Apple M9", 40) is None


def test_verdicts():
    span = Span(100, 120)
    assert span.verdict(91) == "confirmed within 10%"
    assert span.verdict(131) == "confirmed within 10%"
    assert span.verdict(80) == "refuted, -20%"
    assert span.verdict(180) == "refuted, +50%"


def test_the_built_in_model_reads_what_bench_says():
    assert MODELS[0].weight_bytes == pytest.approx(98.2e6, rel=1e-3)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("size", [1 << 20, 1 << 25, 1 << 29])
def test_cut_models_fit_and_are_models(model, size):
    small = bench_mac.cut(model, size)
    assert small.file_bytes <= size
    assert 1 <= small.layers <= model.layers
    assert small.heads % small.kv_heads == 0
    assert small.hidden % small.group_size == 0
    assert small.intermediate % small.group_size == 0


def test_the_fit_finds_rate_and_overhead():
    times = [(m, m.weight_bytes / 300e9 + m.layers * 20e-6) for m in MODELS]
    assert bench_mac.fit(times) == pytest.approx((300, 20))


def test_without_mps_bench_mac_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    result = CliRunner().invoke(bench.app, ["--mac"])
    assert isinstance(result.exception, Q4MetalError)
    assert_one_sentence(result.exception, "no Metal GPU here; run it on a Mac")
