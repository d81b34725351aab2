"""The single operators, computed by the .metal text: torch tensors in, torch tensors out.

Kernels, names, argument structs and grids come from csrc/metal/launch.h, through a small C library
that is compiled from it here: what the host would do is what is tested.
"""

import ctypes
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .build import host_library
from .library import Library, Unwritten, compile

METAL = Path(__file__).resolve().parents[2] / "csrc" / "metal"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of DType
OPS = ("matvec", "matmul", "matmul_plain", "embedding", "dequantize", "quantize")

_ABI = r"""
#include "launch.h"
#include <algorithm>
#include <cstring>
using namespace q4metal;
using namespace q4metal::mps;

// a: in, scales, out, bits, group_size, rows, exact
static KernelKey key_of(int op, const int* a) {
  const DType in = DType(a[0]), scales = DType(a[1]), out = DType(a[2]);
  switch (Op(op)) {
  case Op::matvec: return matvec_key(in, scales, a[3], a[4], a[5]);
  case Op::matmul: return matmul_key(in, scales, a[3], a[4], a[5], true, a[6]);
  case Op::matmul_plain: return matmul_key(in, scales, a[3], a[4], a[5], false, a[6]);
  case Op::embedding: return embedding_key(scales, out, a[3], a[4]);
  case Op::dequantize: return dequantize_key(scales, out, a[3], a[4]);
  case Op::quantize: return quantize_key(in, a[3], a[4]);
  }
  return {};
}

extern "C" uint64_t kernel(int op, const int* a, char* text) {
  const KernelKey key = key_of(op, a);
  const Kernel k = kernel_of(key);
  const std::string all = std::string(k.family) + "\n" + k.name + "\n" + k.instantiation;
  std::memcpy(text, all.c_str(), all.size() + 1);
  return key.packed();
}

extern "C" int result(int x, int scales) { return int(result_dtype(DType(x), DType(scales))); }

extern "C" void launch(int op, int64_t rows, int64_t columns, uint32_t* six) {
  const Launch l = Op(op) == Op::matvec ? matvec_launch(columns)
                   : Op(op) == Op::quantize ? quantize_launch(rows)
                   : Op(op) == Op::embedding || Op(op) == Op::dequantize
                       ? expand_launch(rows, columns)
                       : matmul_launch(rows, columns);
  std::copy(l.groups, l.groups + 3, six);
  std::copy(l.threads, l.threads + 3, six + 3);
}
"""


@cache
def _abi() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(host_library(_ABI, "launch_abi", METAL)))
    loaded.kernel.restype = ctypes.c_uint64
    return loaded


@dataclass(frozen=True)
class Kernel:
    """One instantiation: the file it lives in, its host name, and the line that makes it."""

    family: str
    name: str
    instantiation: str


def kernel_of(
    op: str,
    bits: int,
    group_size: int,
    *,
    x: torch.dtype = torch.float32,
    scales: torch.dtype = torch.float32,
    out: torch.dtype = torch.float32,
    rows: int = 1,
    exact: bool = False,
) -> Kernel:
    """The kernel that launch.h names for these shapes; arguments that ``op`` lacks are ignored."""
    numbers = (*(DTYPES.index(d) for d in (x, scales, out)), bits, group_size, rows, int(exact))
    text = ctypes.create_string_buffer(1024)
    _abi().kernel(OPS.index(op), (ctypes.c_int * 7)(*numbers), text)
    return Kernel(*text.value.decode().split("\n", 2))


def launch_of(op: str, rows: int, columns: int) -> tuple[list[int], list[int]]:
    """Threadgroups, and threads in each."""
    six = (ctypes.c_uint32 * 6)()
    _abi().launch(OPS.index(op), ctypes.c_int64(rows), ctypes.c_int64(columns), six)
    return list(six[:3]), list(six[3:])


def compile_kernels(kernels: Iterable[Kernel], mode: str = "typed") -> Library:
    """One family's text with these instantiations."""
    chosen = sorted(set(kernels), key=lambda k: k.name)
    (family,) = {k.family for k in chosen}
    lines = "\n" + "".join(k.instantiation for k in chosen)
    return compile([METAL / f"{family}.metal", lines], mode, [METAL])


def array_of(t: Tensor) -> np.ndarray:
    """The tensor's memory; numpy has no bfloat16."""
    return t.view(torch.int16).numpy() if t.dtype == torch.bfloat16 else t.numpy()


def _dtype_code(t: Tensor | None) -> int:
    return -1 if t is None else DTYPES.index(t.dtype)


class Runner:
    """Runs kernels of one library. ``order`` as in ``Library.run``."""

    def __init__(self, library: Library, order: str = "forward") -> None:
        self.library, self.order = library, order

    def with_order(self, order: str) -> "Runner":
        return Runner(self.library, order)

    def _run(
        self, kernel: Kernel, launch: tuple[list[int], list[int]], buffers: Sequence[object]
    ) -> None:
        self.library.run(kernel.name, *launch, buffers, order=self.order, seed=1)

    def matmul(
        self,
        x: Tensor,
        weight: Tensor,
        scales: Tensor,
        biases: Tensor,
        bias: Tensor | None = None,
        *,
        group_size: int,
        bits: int,
        transpose: bool = True,
        exact: bool = False,
        matvec: bool = False,
    ) -> Tensor:
        """x [rows, K] W^T + bias, or x [rows, N] W + bias; ``matvec``: by that kernel."""
        op = "matvec" if matvec else "matmul" if transpose else "matmul_plain"
        n, k = weight.shape[0], scales.shape[1] * group_size
        rows, columns = x.shape[0], n if transpose else k
        kernel = kernel_of(
            op, bits, group_size, x=x.dtype, scales=scales.dtype, rows=rows, exact=exact
        )
        out = DTYPES[_abi().result(DTYPES.index(x.dtype), DTYPES.index(scales.dtype))]
        y = torch.full((rows, columns), float("nan"), dtype=out)
        code = _dtype_code(bias)
        args = struct.pack("<IIi", k, n, code)
        if not matvec:
            args = struct.pack("<IIIi", rows, k, n, code)
        buffers = [weight, scales, biases, scales if bias is None else bias, x]
        arrays = [*(array_of(b) for b in buffers), Unwritten(array_of(y)), args]
        self._run(kernel, launch_of(op, rows, columns), arrays)
        return y

    def expand(
        self,
        weight: Tensor,
        scales: Tensor,
        biases: Tensor,
        ids: Tensor | None = None,
        *,
        group_size: int,
        bits: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """The rows ``ids`` of W, or all."""
        op = "dequantize" if ids is None else "embedding"
        n, k = weight.shape[0], scales.shape[1] * group_size
        rows = n if ids is None else ids.numel()
        kernel = kernel_of(op, bits, group_size, scales=scales.dtype, out=dtype)
        out = torch.full((rows, k), float("nan"), dtype=dtype)
        id_bytes = 4 if ids is None else ids.element_size()
        buffers = [weight, scales, biases, scales if ids is None else ids]
        arrays = [array_of(b) for b in buffers]
        args = struct.pack("<IIII", rows, k, n, id_bytes)
        self._run(kernel, launch_of(op, rows, k), [*arrays, Unwritten(array_of(out)), args])
        return out

    def quantize(self, w: Tensor, *, group_size: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """weight, scales, biases of w [N, K]."""
        n, k = w.shape
        kernel = kernel_of("quantize", bits, group_size, x=w.dtype)
        weight = torch.full((n, k * bits // 32), -1, dtype=torch.int32)
        scales = torch.full((n, k // group_size), float("nan"), dtype=w.dtype)
        biases = torch.full_like(scales, float("nan"))
        groups = scales.numel()
        outputs = [Unwritten(array_of(t)) for t in (weight, scales, biases)]
        launch = launch_of("quantize", groups, k)
        self._run(kernel, launch, [array_of(w), *outputs, struct.pack("<I", groups)])
        return weight, scales, biases
