"""Measures what predictions.py predicts, on a Mac: ``python -m torch_q4metal.bench --mac``.

Kernels are checked before they are timed (self_check.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .decode import plan_of
from .decode_time import time_decoding
from .device import resolve_device
from .device_check import check_metal_plans
from .errors import MemoryLimitError, Q4MetalError
from .mac_kernels import COLD_BYTES, STEPS, StepPass, Weights, read_pass, time_in_turns
from .model_formats import Format
from .model_shapes import MODELS, ModelShape
from .predictions import (
    CHIPS,
    DISPATCHES_PER_LAYER,
    PROBE_SHARE,
    ROWS_FACTORS,
    Chip,
    Span,
    chip_of,
    dispatches_of,
    tok_s,
    unknown_chip,
)
from .random_model import random_model
from .self_check import place

_SMALLEST_BYTES = 1 << 20
_PROMPT = [1, 2, 3, 4]
_WARM_UP = 4  # tokens
_TINY = ModelShape("tiny", "llama", 64, 64, 24, 2, 1, 32, 64, True)


@dataclass(frozen=True)
class Row:
    """One line: a measured number beside the predicted one. Numbers are in ``unit``."""

    name: str
    unit: str
    measured: float | None
    predicted: Span | None
    remark: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None or self.predicted is None:
            return self.remark
        return self.predicted.verdict(self.measured)

    def __str__(self) -> str:
        measured = "" if self.measured is None else f"{self.measured:.4g}"
        span = self.predicted
        predicted = "" if span is None else f"{span.low:.4g} to {span.high:.4g}"
        return f"{self.name:<46} {measured:>10} {self.unit:<10} {predicted:>16}  {self.verdict}"


def measure(size: int | None, rounds: int, tokens: int) -> tuple[str, Iterator[Row]]:
    """(what was measured on, the rows as they come): medians of ``rounds``, with so many tokens.

    ``size``: bytes of weights in a pass over a kernel, and the most of a model, which is cut to
    it; None: ``COLD_BYTES``, and whole models. Raises Q4MetalError where there is no MPS, and
    SelfCheckError for a wrong kernel.
    """
    if not torch.backends.mps.is_available():
        raise Q4MetalError(
            "bench --mac measures Metal kernels, and torch finds no Metal GPU here; run it on a "
            "Mac with Apple silicon and macOS 14."
        )
    device = resolve_device("mps")
    if size is not None and size < _SMALLEST_BYTES:
        raise Q4MetalError(
            f"--mac-bytes is {size}, but passes over less than {_SMALLEST_BYTES} bytes say nothing."
        )
    for row in check_metal_plans([Format(4, 64, torch.bfloat16)]):
        if not row.ok:
            raise Q4MetalError(row.text)
    return place(), _rows(device, size, rounds, tokens)


def _rows(device: torch.device, size: int | None, rounds: int, tokens: int) -> Iterator[Row]:
    seven = next(model for model in MODELS if model.name == "Qwen2.5-7B")
    shape = cut(seven, size or COLD_BYTES) if size else seven
    weights = Weights(size or COLD_BYTES, device)
    passes = {name: StepPass(shape, kind, weights) for name, kind in STEPS.items()}
    gate_up = "norm, gate, up, SwiGLU"
    wide = {
        f"{gate_up}, {rows} rows": StepPass(shape, STEPS[gate_up], weights, rows=rows)
        for rows in ROWS_FACTORS
    }
    seconds = time_in_turns({"read probe": read_pass(weights.codes), **passes, **wide}, rounds)
    probe = weights.codes.nbytes / seconds["read probe"] / 1e9
    chip = _chip(probe)
    basis = f"{probe / chip.gb_s:.0%} of {chip.gb_s:g} GB/s ({chip.title})"
    if chip not in CHIPS:
        basis = "this chip is not listed: rates are predicted from this one"
    yield Row("read probe", "GB/s", probe, None, basis)
    for name, timed in passes.items():
        rate = timed.weight_bytes / seconds[name] / 1e9
        yield Row(name, "GB/s", rate, chip.stream)
        yield Row(f"{name}, of the probe", "%", 100 * rate / probe, Span(100 * PROBE_SHARE, 100))
    for count, factor in ROWS_FACTORS.items():
        ratio = seconds[f"{gate_up}, {count} rows"] / seconds[gate_up]
        yield Row(f"{count} rows at once", "times 1", ratio, Span(1.0, factor))
    del weights, passes, wide
    yield _dispatch_row(device, chip, rounds)
    yield from _model_rows(device, chip, size, rounds, tokens)


def _chip(probe: float) -> Chip:
    try:
        name, cores = torch.backends.mps.get_name(), torch.backends.mps.get_core_count()
    except (AttributeError, RuntimeError):
        name, cores = "", 0
    return chip_of(name, cores) or unknown_chip(probe)


def _dispatch_row(device: torch.device, chip: Chip, rounds: int) -> Row:
    """Of steps that have next to nothing to do."""
    tiny = StepPass(_TINY, None, Weights(1 << 16, device), layers=_TINY.layers)
    seconds = time_in_turns({"tiny": tiny}, rounds)["tiny"]
    layer = seconds / tiny.dispatches * DISPATCHES_PER_LAYER * 1e6
    return Row("a layer's dispatches, of tiny steps", "µs", layer, _layer_span(chip))


def _layer_span(chip: Chip) -> Span:
    micro = 1e6 * DISPATCHES_PER_LAYER
    return Span(micro * chip.dispatch.low, micro * chip.dispatch.high)


def _model_rows(
    device: torch.device, chip: Chip, size: int | None, rounds: int, tokens: int
) -> Iterator[Row]:
    measured: list[tuple[ModelShape, float]] = []
    for whole in MODELS:
        shape = cut(whole, size) if size else whole
        try:
            model = random_model(shape, device, len(_PROMPT) + max(tokens, _WARM_UP))
        except MemoryLimitError as error:
            yield Row(f"{shape.name}", "tok/s", None, None, f"not measured: {error}")
            continue
        time_decoding(model, [_PROMPT], _WARM_UP)
        rate = statistics.median(time_decoding(model, [_PROMPT], tokens)[1] for _ in range(rounds))
        measured.append((shape, 1 / rate))
        if (plan := plan_of(model)) is not None:
            count, wanted = len(plan.native.steps(1)), dispatches_of(shape)
            yield Row(f"{shape.name}, a token", "dispatches", count, Span(wanted, wanted))
        yield Row(shape.name, "tok/s", rate, tok_s(shape, chip.stream, chip.dispatch))
        del model
        torch.mps.empty_cache()
    if len(measured) < 2:
        return
    rate, layer = fit(measured)
    yield Row("weights, from all models", "GB/s", rate, chip.stream)
    yield Row("a layer's dispatches, from all models", "µs", layer, _layer_span(chip))


def fit(measured: list[tuple[ModelShape, float]]) -> tuple[float, float]:
    """(GB/s, microseconds a layer) that explain the seconds of a token of several models best.

    Least squares of relative errors, as each model counts the same.
    """
    table = torch.tensor(
        [[shape.weight_bytes / 1e9, shape.layers / 1e6] for shape, _ in measured],
        dtype=torch.float64,
    )
    seconds = torch.tensor([seconds for _, seconds in measured], dtype=torch.float64)
    scaled = table / seconds[:, None]
    per_gb, per_layer = torch.linalg.lstsq(scaled, torch.ones(len(measured), 1).double()).solution
    return 1 / float(per_gb), float(per_layer)


def cut(shape: ModelShape, size: int) -> ModelShape:
    """The model with fewer layers, and smaller ones if need be, so that it has at most so many
    bytes of weights.
    """
    if shape.file_bytes <= size:
        return shape
    small = replace(shape, layers=1)
    while small.file_bytes > size:
        widths = {"vocabulary": small.vocabulary, "intermediate": small.intermediate}
        widths |= {"hidden": 4 * small.hidden}
        name = max(widths, key=lambda key: widths[key])
        half = getattr(small, name) // 2 // 128 * 128
        if half == 0:
            break
        small = replace(small, **{name: half})
        if name == "hidden":
            small = replace(small, heads=max(small.kv_heads, small.heads // 2))
            small = replace(small, heads=small.heads // small.kv_heads * small.kv_heads)
    layers = 1 + max(0, size - small.file_bytes) // small.layer_bytes
    small = replace(small, layers=min(shape.layers, layers))
    return replace(small, name=f"{shape.name}, cut to {small.file_bytes / 1e6:.3g} MB")
