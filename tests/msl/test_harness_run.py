"""Dispatching: buffers, grids, what is refused, crashes, the C interface."""

import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from .build import RUNTIME, cache_folder
from .library import Library, MetalRunError, Unwritten, compile

MODES = ["typed", "check"]
TEXT = """
#include <metal_stdlib>
using namespace metal;
struct Args { uint n; float factor; };
kernel void scale(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                  constant Args& args [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  if (i < args.n) y[i] = args.factor * x[i];
}
kernel void shift(device float* a [[buffer(0)]], device const float* b [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {
  const float next = b[i];
  a[i] = next + 1;
}
kernel void far(device ulong* address [[buffer(0)]], device float* y [[buffer(1)]]) {
  y[0] = *(device float*)address[0];
}
kernel void vector(device const float4* x [[buffer(0)]], device float4* y [[buffer(1)]]) {
  y[0] = x[0];
}
kernel void divide(device int* x [[buffer(0)]]) { x[0] = x[0] / x[1]; }
kernel void deep(device int* x [[buffer(0)]]) {
  volatile char room[400000];
  for (int i = 399999; i >= 0; i--) room[i] = x[0];
  x[1] = room[x[2]];
}
[[kernel, max_total_threads_per_threadgroup(2 * 256)]] void
wide(device uint* x [[buffer(0)]], uint i [[thread_position_in_grid]]) { x[i] = i; }
"""


@cache
def compiled(mode: str) -> Library:
    return compile(TEXT, mode)


def arguments(n: int, factor: float) -> bytes:
    return np.array([(n, factor)], [("n", "u4"), ("factor", "f4")]).tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_buffers_by_number_name_offset_and_bytes(mode: str) -> None:
    x, y = np.arange(40, dtype=np.float32), np.zeros(48, np.float32)
    buffers: dict = {"x": (x, 8), 1: (y, 16), "args": arguments(32, 2)}
    done = compiled(mode).run("scale", 2, 16, buffers)
    assert (y[16:] == 2 * x[8:]).all()
    assert (y[:16] == 0).all()
    if mode == "check":
        assert done.read == {0: [(0, 128)], 1: [], 2: [(0, 8)]}
        assert done.written == {0: [], 1: [(0, 128)], 2: []}


@pytest.mark.parametrize("mode", MODES)
def test_one_array_in_two_buffers(mode: str) -> None:
    x = np.zeros(64, np.float32)
    done = compiled(mode).run("shift", 2, 32, [x, x])
    assert (x == 1).all()
    if mode == "check":
        assert done.written[0] == [(0, 256)]
        assert done.read[0] + done.read[1] == [(0, 256)]


def test_overlapping_buffers_race_as_the_memory_they_are() -> None:
    x = np.zeros(65, np.float32)
    with pytest.raises(MetalRunError, match=r"^shift: race: .* of buffer\(0\) 'a'"):
        compiled("check").run("shift", 2, 32, [(x, 1), x])


def test_neighbours_in_one_allocation_are_apart() -> None:
    x, y = np.ones(64, np.float32), np.zeros(32, np.float32)
    message = r"read of 4 bytes at byte 128 of buffer\(0\) 'x', which has 128"
    with pytest.raises(MetalRunError, match=message):
        compiled("check").run("scale", 2, 32, [x[:32], Unwritten(x[32:]), arguments(64, 1)])
    compiled("check").run("scale", 2, 32, [x[:32], y, arguments(32, 1)])


def test_what_is_written_comes_back_and_nothing_else() -> None:
    x, y = np.ones(8, np.float32), np.full(16, 7, np.float32)
    compiled("check").run("scale", 1, 32, [x, Unwritten(y), arguments(8, 3)])
    assert y.tolist() == [3] * 8 + [7] * 8


def test_an_array_that_is_not_writeable_must_not_be_written() -> None:
    x, y = np.ones(8, np.float32), np.zeros(8, np.float32)
    y.flags.writeable = False
    message = r"declares const: write of 4 bytes at byte 0 of buffer\(1\)"
    with pytest.raises(MetalRunError, match=message):
        compiled("check").run("scale", 1, 8, [x, y, arguments(8, 3)])


def test_only_contiguous_arrays_are_buffers() -> None:
    x = np.ones((4, 4), np.float32)
    with pytest.raises(ValueError, match="contiguous"):
        compiled("typed").run("scale", 1, 8, [x[:, 1], x, arguments(4, 1)])


REFUSED = [
    ({"kernel": "nothing"}, "nothing: no kernel of this name"),
    ({"threadgroups": 0}, "scale: a grid of 0 threads"),
    ({"threads_per_threadgroup": 0}, "scale: a grid of 0 threads"),
    ({"threads_per_threadgroup": (64, 32)}, "a threadgroup of 2048 threads; at most 1024"),
    ({"threads_per_threadgroup": 416}, "416 threads; Metal may drop it unless max_total_threads"),
    ({"drop": 1}, "scale: buffer(1) 'y' is not bound"),
    ({"args": b"1234"}, "scale: buffer(2) 'args' has 4 bytes, its type needs 8"),
    ({"extra": 4}, "scale: buffer(4) is bound, the kernel has no such parameter"),
    ({"threadgroup_bytes": [20]}, "threadgroup(0) of 20 bytes; Metal wants a multiple of 16"),
    ({"threadgroup_bytes": [32768, 16]}, "threadgroup arguments of 32784 bytes, the limit is"),
    ({"constants": {3: True}}, "scale: function constant 3 does not exist in the library"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refused(change: dict, message: str) -> None:
    x, y = np.ones(8, np.float32), np.zeros(8, np.float32)
    buffers: dict = {0: x, 1: y, 2: change.get("args", arguments(8, 1))}
    if "drop" in change:
        buffers[change["drop"]] = None
    if "extra" in change:
        buffers[change["extra"]] = x
    options = {k: v for k, v in change.items() if k not in ("drop", "extra", "args")}
    call = {"kernel": "scale", "threadgroups": 1, "threads_per_threadgroup": 8, **options}
    library = compiled("typed")
    library.parameters.setdefault("nothing", library.parameters["scale"])
    with pytest.raises(MetalRunError) as error:
        library.run(buffers=buffers, **call)
    assert message in str(error.value)


@pytest.mark.parametrize("mode", MODES)
def test_a_kernel_that_says_how_many_threads_it_is_for(mode: str) -> None:
    x = np.zeros(1024, np.uint32)
    compiled(mode).run("wide", 2, 512, [x])
    assert (x == np.arange(1024)).all()
    with pytest.raises(MetalRunError, match="wide: a threadgroup of 1024 threads; Metal may drop"):
        compiled(mode).run("wide", 1, 1024, [x])


def test_a_crash_is_an_error_and_not_the_end() -> None:
    library = compiled("typed")
    y = np.zeros(8, np.float32)
    for address in (0, 16, 1 << 46):
        message = r"^far: access to memory that is not there.*text.metal:15"
        with pytest.raises(MetalRunError, match=message):
            library.run("far", 1, 1, [np.array([address], np.uint64), y])
    with pytest.raises(MetalRunError, match=r"^vector: .* a misaligned vector.*text.metal:18"):
        library.run("vector", 1, 1, [(y, 1), y[:4].copy()])
    with pytest.raises(MetalRunError, match=r"^divide: integer division by zero.*text.metal:20"):
        library.run("divide", 1, 1, [np.zeros(2, np.int32)])
    with pytest.raises(MetalRunError, match=r"^deep: access to memory that is not there"):
        library.run("deep", 1, 1, [np.zeros(3, np.int32)])
    far = np.array([5], np.float32)
    library.run("far", 1, 1, [np.array([far.ctypes.data], np.uint64), y])
    assert y[0] == 5


def test_pointers_lead_to_resident_memory_only() -> None:
    far, y = np.array([5], np.float32), np.zeros(1, np.float32)
    address = np.array([far.ctypes.data], np.uint64)
    compiled("check").run("far", 1, 1, [address, y], resident=[far])
    assert y[0] == 5
    with pytest.raises(MetalRunError, match="out of bounds: read of 4 bytes far from any buffer"):
        compiled("check").run("far", 1, 1, [address, y])
    with pytest.raises(MetalRunError, match="through a null pointer"):
        compiled("check").run("far", 1, 1, [np.zeros(1, np.uint64), y])


def test_memory_that_is_bound_and_resident_is_one() -> None:
    x = np.array([5, 0], np.float32)
    address = np.array([x.ctypes.data], np.uint64)
    done = compiled("check").run("far", 1, 1, [address, (x, 1)], resident=[x])
    assert x[1] == 5
    assert done.read[1] + done.read[2] == [(0, 4)]
    assert done.written[1] == [(0, 4)] or done.written[2] == [(4, 8)]


def test_a_build_is_kept_and_follows_its_includes(tmp_path: Path) -> None:
    (tmp_path / "factor.h").write_text("#define FACTOR 2\n")
    kernel = tmp_path / "k.metal"
    kernel.write_text('#include "factor.h"\nkernel void k(device int* x) { x[0] = FACTOR; }\n')
    first = compile(kernel)
    node = first.path.stat().st_ino
    assert compile(kernel).path.stat().st_ino == node
    (tmp_path / "factor.h").write_text("#define FACTOR 3\n")
    second = compile(kernel)
    assert second.path != first.path
    for library, factor in ((first, 2), (second, 3)):  # side by side
        x = np.zeros(1, np.int32)
        library.run("k", 1, 1, [x])
        assert x[0] == factor


PROGRAM = r"""
#include "library.h"
#include <cstdio>

int main(int, char** argv) {
  msl::Library library(argv[1]);
  float x[40], y[40] = {};
  for (int i = 0; i < 40; i++) x[i] = float(i);
  struct { uint32_t n; float factor; } args = {40, 3};
  msl_buffer buffers[] = {{x, sizeof x, MSL_READ_ONLY, 0}, {y, sizeof y, MSL_UNWRITTEN, 0},
                          {&args, sizeof args, MSL_READ_ONLY, 0}};
  msl_dispatch dispatch{};
  dispatch.kernel = "scale";
  dispatch.threads[0] = 40, dispatch.threads[1] = dispatch.threads[2] = 1;
  dispatch.threads_per_threadgroup[0] = 32;
  dispatch.threads_per_threadgroup[1] = dispatch.threads_per_threadgroup[2] = 1;
  dispatch.buffers = buffers;
  dispatch.buffer_count = 3;
  dispatch.order = MSL_REVERSE;
  library.run(dispatch);
  const msl_range written = library.touched(1, true).at(0);
  std::printf("%g %g %llu-%llu %s %d\n", y[1], y[39], (unsigned long long)written.begin,
              (unsigned long long)written.end, library.parameters("scale").at(2)->declaration,
              library.checks());
  args.n = 41, dispatch.threads[0] = 64;
  try {
    library.run(dispatch);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
}
"""


def test_c_interface(tmp_path: Path) -> None:
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM)
    command = ["c++", "-std=c++20", "-Wall", "-Werror", f"-I{RUNTIME}", str(source), "-ldl"]
    subprocess.run([*command, "-o", str(program)], check=True)
    path = str(compiled("check").path)
    result = subprocess.run([str(program), path], capture_output=True, text=True, check=True)
    lines = result.stdout.split("\n")
    assert lines[0] == "3 117 0-160 constant Args& args 1"
    assert lines[1].startswith(
        "scale: out of bounds: read of 4 bytes at byte 160 of buffer(0) 'x', which has 160 at "
        "text.metal:7"
    )


def test_builds_are_in_the_cache_folder() -> None:
    assert compiled("typed").path.parent == cache_folder()
