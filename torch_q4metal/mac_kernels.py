"""How fast the Metal kernels read weights: each kind of step of a decode plan on its own.

A pass goes over more weights than any cache holds: matrices lie one behind the other in one buffer
of random bytes, and a pass reads no byte of it twice. Contestants take turns, forth and back, so
that a chip that gets warm is as unfair to all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _extension
from .cache import BLOCK
from .model_shapes import ModelShape
from .random_model import random_words

STEPS = {
    "norm, QKV, RoPE, append": "norm_qkv_rope_append",
    "output projection, residual": "output_residual",
    "norm, gate, up, SwiGLU": "norm_gate_up_swiglu",
    "down projection, residual": "down_residual",
    "norm, head": "norm_head",
}
"""Kinds of steps by the names that they get in tables."""
COLD_BYTES = 1 << 29
"""Of a pass that no cache helps: four times what the largest holds."""
_PROBE_SUMS = 1024 * 256 // 32  # csrc/metal/read_probe_mps.cpp
_PASSES = 4  # queued in a row, so that the GPU is not idle between them
_LARGEST_GAMMA = 1 << 16


class Weights:
    """``size`` bytes of random codes on the device, and scales and biases for as many of them as of
    4-bit codes in groups of 64.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = _extension.load().DeviceMemory()
        self.device = device
        words = -(-size // 16) * 4
        self.codes = random_words(words, device)
        groups = words // 8
        self._scales = torch.full((groups,), 1e-3, dtype=torch.bfloat16, device=device)
        self._biases = torch.full((groups,), -7.5e-3, dtype=torch.bfloat16, device=device)
        self._ones = torch.ones(_LARGEST_GAMMA, device=device)
        self.gamma = self._address(self._ones, 0)

    def segment(self, rows: int, columns: int, begin: int = 0) -> Any:
        """The matrix [rows, columns] whose codes begin at byte ``begin``."""
        native = _extension.load()
        return native.packed_segment(
            weight=self._address(self.codes, begin),
            scales=self._address(self._scales, begin // 16),
            biases=self._address(self._biases, begin // 16),
            scales_dtype=native.DType.bfloat16,
            out_features=rows,
            in_features=columns,
            group_size=64,
            bits=4,
            bias=0,
        )

    def _address(self, tensor: Tensor, offset: int) -> int:
        return int(self.memory.address(tensor.untyped_storage().data_ptr(), offset))


def read_pass(words: Tensor) -> Callable[[], None]:
    """Queues a pass of the read probe over ``words`` on MPS."""
    sums = torch.zeros(_PROBE_SUMS, dtype=torch.int32, device=words.device)
    return lambda: torch.ops.q4metal.metal_read_probe(words, sums)


def read_gb_s(size: int, rounds: int) -> float:
    """10**9 bytes a second at which the GPU reads ``size`` bytes: a median of so many rounds."""
    words = random_words(size // 4, torch.device("mps"))
    seconds = time_in_turns({"read probe": read_pass(words)}, rounds)["read probe"]
    read = words.nbytes
    del words
    torch.mps.empty_cache()  # a model may need that memory
    return read / seconds / 1e9


class StepPass:
    """A pass over steps of one kind, or of all, on as many different weights as there are.

    ``weight_bytes``  that it reads, scales and biases included
    ``dispatches``    that it takes
    """

    def __init__(
        self,
        shape: ModelShape,
        kind: str | None,
        weights: Weights,
        *,
        rows: int = 1,
        layers: int = 0,
    ) -> None:
        """``layers``: how many; 0 is as many as have weights of their own.

        Raises ValueError where there are not weights enough for one.
        """
        self._matrices = _matrices(shape)
        self._weights, self._kind, self._begin = weights, kind, 0
        codes = weights.codes.nbytes
        if kind is not None:
            size = sum(n * k // 2 for n, k in self._matrices[kind])
            if size > codes:
                raise ValueError(f"{kind} reads {size} bytes of codes, and there are {codes}")
            layers = layers or (1 if kind == "norm_head" else codes // size)
        blocks = [self._layer() for _ in range(layers)]
        native, device = _extension.load(), weights.device
        native_shape = native.Shape(
            shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, shape.head_dim,
            shape.vocabulary, layers, 1e-5, shape.head_dim**-0.5, native.DType.bfloat16,
            native.Precision.fast,
        )  # fmt: skip
        head = native.Head(weights.gamma, *self._segments("norm_head"))
        kinds = [] if kind is None else [kind]
        if kind == "norm_head":
            kinds.append("argmax")  # by which a plan knows that it has a head; it is left out
        self._plan = native.MetalDecodePlan(
            native_shape, None, blocks, head, weights.memory, BLOCK, False, kinds
        )
        self.weight_bytes = self._begin * 9 // 8
        self.dispatches = len(self._plan.steps(rows)) - (kind in (None, "norm_head"))
        has_head = kind in (None, "norm_head")
        slab = (2, layers, 1, shape.kv_heads, BLOCK, shape.head_dim)
        self._arguments = (
            torch.randn(rows, shape.hidden).to(device),
            torch.arange(rows),
            torch.zeros(rows, 2, shape.head_dim, device=device),
            torch.zeros(rows, 1, dtype=torch.int32, device=device),
            None,
            [torch.zeros(slab, dtype=torch.bfloat16, device=device)],
            torch.zeros(rows, shape.vocabulary if has_head else shape.hidden, device=device),
        )

    def __call__(self) -> None:
        """Queues it."""
        torch.ops.q4metal.decode_step(self._plan.handle, *self._arguments)

    def _segments(self, kind: str) -> list[Any]:
        """Those of a step. Each is different of the chosen kind only: no other is looked at."""
        made = []
        for rows, columns in self._matrices[kind]:
            made.append(self._weights.segment(rows, columns, self._begin))
            if kind == self._kind:
                self._begin += rows * columns // 2
        return made

    def _layer(self) -> Any:
        gamma = self._weights.gamma
        attention = self._segments("norm_qkv_rope_append") + self._segments("output_residual")
        mlp = self._segments("norm_gate_up_swiglu") + self._segments("down_residual")
        return _extension.load().Layer(gamma, *attention, gamma, *mlp)


def _matrices(shape: ModelShape) -> dict[str, list[tuple[int, int]]]:
    """Matrices [N, K] that a step of each kind reads."""
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "norm_qkv_rope_append": [(query, shape.hidden), *[(kv, shape.hidden)] * 2],
        "output_residual": [(shape.hidden, query)],
        "norm_gate_up_swiglu": [(shape.intermediate, shape.hidden)] * 2,
        "down_residual": [(shape.hidden, shape.intermediate)],
        "norm_head": [(shape.vocabulary, shape.hidden)],
    }


def time_in_turns(contestants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of a pass of each, over so many rounds forth and back."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()  # compiles
    for _ in range(rounds):
        for name in (*contestants, *reversed(contestants)):
            torch.mps.synchronize()
            begin = time.perf_counter()
            for _ in range(_PASSES):
                contestants[name]()
            torch.mps.synchronize()
            seconds[name].append((time.perf_counter() - begin) / _PASSES)
    return {name: statistics.median(times) for name, times in seconds.items()}
