"""How fast decoding should be on Apple chips, before any was measured: python -m
torch_q4metal.predictions prints the README's table, python -m torch_q4metal.bench --mac tests it.

A token takes  weight bytes / streaming rate + dispatches * time of a dispatch.  A large model is
bound by the first term, a small one by the second. Nothing here was measured with this package:

* Streaming. Fourteen dense models under MLX on an M5 Max fit  bytes / 558 GB/s + 34 us * layers
  within 5 %, on an M1 Ultra  bytes / 602 GB/s + 94 us * layers  more loosely (benchmarks of
  github.com/lablup/mlxcel, 2026-05-19 and 2026-09-08): 91 % and 75 % of the specified rates. The
  kernels here read weights in the same shape. Chips without a fit get that span, less where a read
  alone was measured to be slower: M3 Ultra 692 GB/s (jundot/omlx 2238), M4 101 and M4 Pro 243.7
  (EschaLabs/escha-mlx 2).
* Dispatches. MLX needs about 20 a layer, the plan here 5. One of those was measured to cost 2.05
  us on the GPU (penta2himajin/qwisp 143); the pessimistic end assumes that fewer dispatches save
  only half of MLX's time a layer. Chips older than M5 get the span between both fits.
* Rows. MLX's matvec of one row, 5120 -> 17408, took 0.129 ms on an M3 Max (mlx 3863); 4 rows are
  to take no more than 0.17 ms, 8 rows 0.25 ms.
* A matrix kernel is to read at 90 % or more of the rate of a kernel that only reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from .model_shapes import MODELS, ModelShape

PROBE_SHARE = 0.9
"""Of the read probe's rate, that matrix kernels reach at least."""
ROWS_FACTORS = {4: 0.17 / 0.129, 8: 0.25 / 0.129}
"""How many times longer so many rows take than one, at most."""
TOLERANCE = 0.1
"""Measured numbers this close to the predicted span confirm it."""
DISPATCHES_PER_LAYER, DISPATCHES_AROUND = 5, 3
_FITTED = (0.75, 0.91)  # of the specified rate: M1 Ultra, M5 Max
_DISPATCH = 2.05e-6  # seconds, M5 Max
_MLX_LAYER = {"M1 Ultra": 94e-6, "M5 Max": 34e-6}  # seconds


@dataclass(frozen=True)
class Span:
    """A predicted number: somewhere between ``low`` and ``high``."""

    low: float
    high: float

    def verdict(self, measured: float, tolerance: float = TOLERANCE) -> str:
        """Whether a measurement confirms it, within ``tolerance`` of its ends."""
        if self.low * (1 - tolerance) <= measured <= self.high * (1 + tolerance):
            return f"confirmed within {tolerance:.0%}"
        end = self.low if measured < self.low else self.high
        return f"refuted, {measured / end - 1:+.0%}"


@dataclass(frozen=True)
class Chip:
    """A chip as Metal names it, without "Apple".

    ``gb_s``     specified memory bandwidth, 10**9 bytes a second
    ``stream``   what matrix kernels should read, the same unit
    ``dispatch`` seconds of one dispatch of the decode plan
    ``cores``    of its GPU, where chips of this name differ; 0 where they do not
    """

    name: str
    gb_s: float
    stream: Span
    dispatch: Span
    cores: int = 0

    @property
    def title(self) -> str:
        return f"{self.name}, {self.cores} GPU cores" if self.cores else self.name


def _chip(name: str, gb_s: float, cores: int = 0, read: float | None = None) -> Chip:
    """``read``: GB/s of reading alone, where it was measured."""
    half = {chip: seconds / 2 / DISPATCHES_PER_LAYER for chip, seconds in _MLX_LAYER.items()}
    low, high = (share * gb_s for share in _FITTED)
    dispatch = Span(_DISPATCH, half["M1 Ultra"])
    if name == "M5 Max":
        low, dispatch = high, Span(_DISPATCH, half["M5 Max"])
    elif name == "M1 Ultra":
        high, dispatch = low, Span(_MLX_LAYER["M1 Ultra"] / 20, half["M1 Ultra"])
    elif name.startswith("M5"):
        dispatch = Span(_DISPATCH, half["M5 Max"])
    return Chip(name, gb_s, Span(low, min(high, read or high)), dispatch, cores)


CHIPS = (
    _chip("M1", 68),
    _chip("M1 Pro", 200),
    _chip("M1 Max", 400),
    _chip("M1 Ultra", 800),
    _chip("M2", 100),
    _chip("M2 Pro", 200),
    _chip("M2 Max", 400),
    _chip("M2 Ultra", 800),
    _chip("M3", 100),
    _chip("M3 Pro", 150),
    _chip("M3 Max", 400, cores=40),
    _chip("M3 Ultra", 819, read=692),
    _chip("M4", 120, read=101),
    _chip("M4 Pro", 273, read=243.7),
    _chip("M4 Max", 410, cores=32),
    _chip("M4 Max", 546, cores=40),
    _chip("M5", 153),
    _chip("M5 Max", 614, cores=40),
)


def chip_of(name: str, cores: int) -> Chip | None:
    """The chip that Metal calls so ("Apple M4 Max"), with so many GPU cores; None if not listed."""
    for chip in CHIPS:
        if chip.name == name.removeprefix("Apple ") and chip.cores in (0, cores):
            return chip
    return None


def unknown_chip(read_gb_s: float) -> Chip:
    """What to expect of a chip that is not listed, from the rate at which it reads memory."""
    low, high = PROBE_SHARE * read_gb_s, read_gb_s
    dispatch = Span(_DISPATCH, _MLX_LAYER["M1 Ultra"] / 2 / DISPATCHES_PER_LAYER)
    return Chip("a chip that is not listed", read_gb_s, Span(low, high), dispatch)


def dispatches_of(model: ModelShape) -> int:
    """Of a greedy token, up to 1024 positions."""
    return DISPATCHES_PER_LAYER * model.layers + DISPATCHES_AROUND


def tok_s(model: ModelShape, stream: Span, dispatch: Span) -> Span:
    """Tokens a second at these rates (10**9 bytes a second, seconds)."""
    dispatches = dispatches_of(model)
    slow = model.weight_bytes / stream.low / 1e9 + dispatches * dispatch.high
    fast = model.weight_bytes / stream.high / 1e9 + dispatches * dispatch.low
    return Span(1 / slow, 1 / fast)


def markdown() -> str:
    """The tables of the README, lines of Markdown."""
    lines = ["| model | weights a token | dispatches a token |", "|---|---|---|"]
    lines += [
        f"| {model.name} | {model.weight_bytes / 1e6:.0f} MB | {dispatches_of(model)} |"
        for model in MODELS
    ]
    heads = " | ".join(model.name for model in MODELS)
    lines += [
        "",
        f"| predicted tok/s | memory, GB/s | weights, GB/s | a layer's dispatches, µs | {heads} |",
        "|---|---|---|---|" + "---|" * len(MODELS),
    ]
    for chip in CHIPS:
        per_layer = Span(
            DISPATCHES_PER_LAYER * chip.dispatch.low * 1e6,
            DISPATCHES_PER_LAYER * chip.dispatch.high * 1e6,
        )
        speeds = [_shown(tok_s(model, chip.stream, chip.dispatch)) for model in MODELS]
        cells = [chip.title, f"{chip.gb_s:g}", _shown(chip.stream), _shown(per_layer), *speeds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(span: Span) -> str:
    low, high = _rounded(span.low), _rounded(span.high)
    return low if low == high else f"{low} to {high}"


def _rounded(number: float) -> str:
    """Two digits of it, three where it begins with a 1; no more is known."""
    digits = 3 if f"{number:e}".startswith("1") else 2
    return f"{float(f'{number:.{digits}g}'):.0f}" if number >= 10 else f"{number:.2g}"


if __name__ == "__main__":
    print(markdown(), end="")
