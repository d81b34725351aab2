"""The decode plan's steps, computed by the .metal text: torch tensors in and out.

As metal_ops, but for csrc/metal/plan_launch.h.
"""

import ctypes
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .build import host_library
from .library import Library, Unwritten, compile
from .metal_ops import DTYPES, METAL, Kernel, array_of

STEPS = (
    "embed", "qkv", "attention", "attention_split", "attention_combine", "residual", "gate_up",
    "head", "argmax", "sample", "copy",
)  # fmt: skip

_ABI = r"""
#include "plan_launch.h"
#include <algorithm>
#include <cstring>
using namespace q4metal;
using namespace q4metal::mps;

static Format format(const int* a) { return {a[0], a[1], DType(a[2])}; }

// a: three formats of three numbers, then dtype of the cache, rows, head_dim, shared heads.
static Kernel kernel_at(int step, const int* a) {
  switch (step) {
  case 0: return embed_kernel(format(a));
  case 1: return qkv_kernel(format(a), format(a + 3), format(a + 6), DType(a[9]), a[10]);
  case 2: return attention_kernel(DType(a[9]), a[11]);
  case 3: return attention_split_kernel(DType(a[9]), a[11], a[12]);
  case 4: return attention_combine_kernel(a[11]);
  case 5: return residual_kernel(format(a), a[10]);
  case 6: return gate_up_kernel(format(a), format(a + 3), a[10]);
  case 7: return head_kernel(format(a), a[10]);
  case 8: return argmax_kernel();
  case 9: return sample_kernel();
  default: return copy_kernel();
  }
}

extern "C" void kernel(int step, const int* a, char* text) {
  const Kernel k = kernel_at(step, a);
  const std::string all = std::string(k.family) + "\n" + k.name + "\n" + k.instantiation;
  std::memcpy(text, all.c_str(), all.size() + 1);
}

// a: rows, N or K of the matrix, heads, kv_heads, head_dim, positions.
extern "C" void launch(int step, const int64_t* a, uint32_t* six) {
  const Launch l = step == 0   ? embed_launch(a[0], a[1])
                   : step == 1 ? qkv_launch(a[2], a[3], a[4])
                   : step == 2 ? attention_launch(a[0], a[2])
                   : step == 3 ? attention_split_launch(a[0], a[2], a[3], a[5])
                   : step == 4 ? attention_combine_launch(a[0], a[2])
                   : step == 5 ? residual_launch(a[1])
                   : step == 6 ? gate_up_launch(a[1])
                   : step == 7 ? head_launch(a[1])
                   : step == 8 ? argmax_launch(a[0])
                   : step == 9 ? sample_launch(a[0])
                               : copy_launch(a[1]);
  std::copy(l.groups, l.groups + 3, six);
  std::copy(l.threads, l.threads + 3, six + 3);
}

extern "C" int shared(int heads, int kv_heads) { return shared_heads(heads, kv_heads); }
extern "C" int chunks(int positions) { return int(chunks_of(positions)); }
"""


@cache
def _abi() -> ctypes.CDLL:
    return ctypes.CDLL(str(host_library(_ABI, "plan_abi", METAL)))


@dataclass(frozen=True)
class Matrix:
    """A matrix [N, K] as a step binds it: packed (bits, group_size) or dense (bits 0)."""

    weight: Tensor
    scales: Tensor | None
    biases: Tensor | None
    bits: int
    group_size: int
    bias: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype if self.scales is None else self.scales.dtype

    @property
    def format(self) -> tuple[int, int, int]:
        return (self.bits, self.group_size, DTYPES.index(self.dtype))

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def buffers(self) -> list[np.ndarray]:
        weight = array_of(self.weight)
        if self.scales is None or self.biases is None:
            return [weight, weight, weight, weight if self.bias is None else array_of(self.bias)]
        scales, biases = array_of(self.scales), array_of(self.biases)
        return [weight, scales, biases, scales if self.bias is None else array_of(self.bias)]


NO_FORMAT = (4, 64, 0)


def plan_kernel(
    step: str,
    formats: Sequence[tuple[int, int, int]] = (),
    *,
    kv: torch.dtype = torch.float32,
    rows: int = 1,
    head_dim: int = 64,
    shared: int = 1,
) -> Kernel:
    """The kernel that plan_launch.h names; arguments that ``step`` lacks are ignored."""
    padded = (*formats, *[NO_FORMAT] * (3 - len(formats)))
    numbers = [n for f in padded for n in f] + [DTYPES.index(kv), rows, head_dim, shared]
    text = ctypes.create_string_buffer(2048)
    _abi().kernel(STEPS.index(step), (ctypes.c_int * 13)(*numbers), text)
    return Kernel(*text.value.decode().split("\n", 2))


def shared_heads(heads: int, kv_heads: int) -> int:
    return int(_abi().shared(heads, kv_heads))


def chunks_of(positions: int) -> int:
    return int(_abi().chunks(positions))


def compile_plan(kernels: Iterable[Kernel], mode: str = "typed") -> dict[str, Library]:
    """A library for each kernel's name; kernels of one family share one."""
    families: dict[str, dict[str, str]] = {}
    for k in kernels:
        families.setdefault(k.family, {})[k.name] = k.instantiation
    found = {}
    for family, lines in families.items():
        text = "\n" + "".join(lines[name] for name in sorted(lines))
        library = compile([METAL / f"{family}.metal", text], mode, [METAL])
        found |= dict.fromkeys(lines, library)
    return found


@dataclass(frozen=True)
class Cache:
    """A KV pool's slabs [2, layers, blocks, kv_heads, 32, head_dim] and the tables of R rows."""

    slabs: list[Tensor]
    block_tables: Tensor  # int32 [R, stride]
    layer: int

    @property
    def dtype(self) -> torch.dtype:
        return self.slabs[0].dtype

    def addresses(self) -> np.ndarray:
        return np.array([(s.data_ptr(), s.shape[2]) for s in self.slabs], np.uint64)

    def args(self) -> bytes:
        _, layers, blocks, kv_heads, _, head_dim = self.slabs[0].shape
        stride = self.block_tables.shape[1]
        return struct.pack("<6I", self.layer, layers, kv_heads, head_dim, stride, blocks)


@dataclass(frozen=True)
class Settings:
    """How a row's token is drawn; see Sampling in plan_launch.h."""

    temperature: float = 1.0
    top_p: float = 0.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int = 0

    def packed(self) -> bytes:
        parts = (self.temperature, self.top_p, self.min_p, self.top_k)
        return struct.pack("<3fIQ", *parts, self.seed)


class PlanRunner:
    """Runs steps of compiled kernels in one run order."""

    def __init__(self, libraries: dict[str, Library], order: str = "forward") -> None:
        self.libraries, self.order = libraries, order

    def with_order(self, order: str) -> "PlanRunner":
        return PlanRunner(self.libraries, order)

    def _run(
        self,
        step: str,
        kernel: Kernel,
        sizes: Sequence[int],
        buffers: Sequence[object],
        resident: Sequence[np.ndarray] = (),
    ) -> None:
        six = (ctypes.c_uint32 * 6)()
        padded = [*sizes, *[1] * (6 - len(sizes))]
        _abi().launch(STEPS.index(step), (ctypes.c_int64 * 6)(*padded), six)
        self.libraries[kernel.name].run(
            kernel.name, list(six[:3]), list(six[3:]), buffers,
            resident=resident, order=self.order, seed=1,
        )  # fmt: skip

    def embed(self, table: Matrix, ids: Tensor, hidden_size: int) -> Tensor:
        hidden = torch.full((len(ids), hidden_size), float("nan"))
        kernel = plan_kernel("embed", [table.format])
        buffers = [*table.buffers(), array_of(ids), Unwritten(array_of(hidden))]
        args = struct.pack("<2I", hidden_size, table.out_features)
        self._run("embed", kernel, [len(ids), hidden_size], [*buffers, args])
        return hidden

    def qkv(
        self,
        matrices: Sequence[Matrix],
        gamma: Tensor,
        hidden: Tensor,
        rope: Tensor,
        positions: Tensor,
        cache: Cache,
        eps: float,
    ) -> Tensor:
        """The queries; keys and values go to the cache."""
        rows, width = hidden.shape
        kv_heads, head_dim = cache.slabs[0].shape[3], cache.slabs[0].shape[5]
        heads = matrices[0].out_features // head_dim
        kernel = plan_kernel("qkv", [m.format for m in matrices], kv=cache.dtype, rows=rows)
        queries = torch.full((rows, heads * head_dim), float("nan"))
        args = cache.args() + _matrix_args(matrices, width, eps) + struct.pack("<I", heads)
        bound = [b for m in matrices for b in m.buffers()]
        inputs = [array_of(t) for t in (rope, positions, cache.block_tables)]
        buffers = [*bound, array_of(gamma), array_of(hidden), Unwritten(array_of(queries))]
        slabs = [array_of(s) for s in cache.slabs]
        sizes = [rows, width, heads, kv_heads, head_dim]
        self._run("qkv", kernel, sizes, [*buffers, *inputs, cache.addresses(), args], slabs)
        return queries

    def attention(
        self, queries: Tensor, positions: Tensor, cache: Cache, scale: float, split: bool
    ) -> Tensor:
        """[R, heads * head_dim]; ``split``: by the kernels for long contexts."""
        rows, width = queries.shape
        kv_heads, head_dim = cache.slabs[0].shape[3], cache.slabs[0].shape[5]
        heads, longest = width // head_dim, int(positions.max()) + 1
        chunks = chunks_of(longest)
        out = torch.full((rows, width), float("nan"))
        partial = torch.full((rows, chunks, heads, head_dim + 2), float("nan"))
        args = cache.args() + struct.pack("<2If", heads, chunks, scale)
        inputs = [array_of(t) for t in (queries, positions, cache.block_tables)]
        slabs = [array_of(s) for s in cache.slabs]
        sizes = [rows, width, heads, kv_heads, head_dim, longest]
        shared = shared_heads(heads, kv_heads)
        first = "attention_split" if split else "attention"
        kernel = plan_kernel(first, kv=cache.dtype, head_dim=head_dim, shared=shared)
        to = Unwritten(array_of(partial if split else out))
        self._run(first, kernel, sizes, [*inputs, cache.addresses(), to, args], slabs)
        if split:
            kernel = plan_kernel("attention_combine", head_dim=head_dim)
            # Chunks behind a row's end stay unwritten, so `partial` is not marked.
            buffers = [array_of(partial), array_of(positions), Unwritten(array_of(out)), args]
            self._run("attention_combine", kernel, sizes, buffers)
        return out

    def residual(self, matrix: Matrix, x: Tensor, hidden: Tensor) -> Tensor:
        """hidden + x W^T + bias."""
        out, (rows, width) = hidden.clone(), x.shape
        kernel = plan_kernel("residual", [matrix.format], rows=rows)
        buffers = [*matrix.buffers(), array_of(x), array_of(out)]
        args = _matrix_args([matrix], width, 0.0)
        self._run("residual", kernel, [rows, matrix.out_features], [*buffers, args])
        return out

    def gate_up(
        self, gate: Matrix, up: Matrix, gamma: Tensor, hidden: Tensor, eps: float
    ) -> Tensor:
        rows, width = hidden.shape
        kernel = plan_kernel("gate_up", [gate.format, up.format], rows=rows)
        out = torch.full((rows, gate.out_features), float("nan"))
        inputs = [array_of(gamma), array_of(hidden), Unwritten(array_of(out))]
        buffers = [*gate.buffers(), *up.buffers(), *inputs, _matrix_args([gate, up], width, eps)]
        self._run("gate_up", kernel, [rows, gate.out_features], buffers)
        return out

    def head(self, matrix: Matrix, gamma: Tensor, hidden: Tensor, eps: float) -> Tensor:
        rows, width = hidden.shape
        kernel = plan_kernel("head", [matrix.format], rows=rows)
        out = torch.full((rows, matrix.out_features), float("nan"))
        inputs = [array_of(gamma), array_of(hidden), Unwritten(array_of(out))]
        buffers = [*matrix.buffers(), *inputs, _matrix_args([matrix], width, eps)]
        self._run("head", kernel, [rows, matrix.out_features], buffers)
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        tokens = torch.full((logits.shape[0],), -1, dtype=torch.int64)
        buffers = [array_of(logits), Unwritten(array_of(tokens))]
        args = struct.pack("<I", logits.shape[1])
        self._run("argmax", plan_kernel("argmax"), [logits.shape[0]], [*buffers, args])
        return tokens

    def sample(self, logits: Tensor, settings: Sequence[Settings], positions: Tensor) -> Tensor:
        tokens = torch.full((logits.shape[0],), -1, dtype=torch.int64)
        sampling = b"".join(s.packed() for s in settings)
        inputs = [array_of(logits), sampling, array_of(positions)]
        args = struct.pack("<I", logits.shape[1])
        buffers = [*inputs, Unwritten(array_of(tokens)), args]
        self._run("sample", plan_kernel("sample"), [logits.shape[0]], buffers)
        return tokens

    def copy(self, values: Tensor) -> Tensor:
        out = torch.full_like(values, float("nan"))
        buffers = [array_of(values), Unwritten(array_of(out)), struct.pack("<I", values.numel())]
        self._run("copy", plan_kernel("copy"), [1, values.numel()], buffers)
        return out


def _matrix_args(matrices: Sequence[Matrix], in_features: int, eps: float) -> bytes:
    bits = sum(1 << i for i, m in enumerate(matrices) if m.bias is not None)
    return struct.pack("<3If", in_features, matrices[0].out_features, bits, eps)
