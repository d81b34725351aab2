"""Builds the stand-in for torch's Metal side, with the host code of csrc/metal in it."""

import concurrent.futures
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import itertools
import json
import os
import runpy
import shlex
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from msl import library as msl_library
from msl.build import MetalCompileError

from torch_q4metal import _extension

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "macos" / "standin"
# Compiled a unit at a time, so that torch's headers are read twice and not ten times; "plan" needs
# none of them. All of csrc/metal is here but the two files that are Objective-C.
UNITS = {
    "standin": [
        "csrc/metal/bindings.cpp",
        "tests/macos/standin/aten_mps.cpp",
        "tests/macos/standin/kernels.cpp",
        "tests/macos/standin/memory.cpp",
        "tests/macos/standin/metal_shader_library.cpp",
        "tests/macos/standin/module.cpp",
        "tests/macos/standin/plan_records.cpp",
        "tests/macos/standin/plan_sink.cpp",
        "tests/macos/standin/queue.cpp",
    ],
    "host": [
        "csrc/metal/decode_plan.cpp",
        "csrc/metal/decode_step_mps.cpp",
        "csrc/metal/ops_mps.mm",
        "csrc/metal/pipelines.cpp",
        "csrc/metal/read_probe_mps.cpp",
    ],
    "plan": ["csrc/metal/encoder.cpp", "csrc/plan/plan.cpp"],
}
FOLDERS = ("csrc", "csrc/metal", "csrc/plan", "tests/macos/standin", "tests/msl/runtime")
SLIPS = ("none", "no barrier", "buffers swapped", "arguments swapped", "grid cut")
_TORCH = Path(torch.__file__).parent
_FLAGS = [
    "-std=c++20", "-O0", "-g0", "-fPIC", "-Wall", "-fvisibility=hidden",
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    "-isystem", str(_TORCH / "include"),
    "-isystem", str(_TORCH / "include/torch/csrc/api/include"),
    "-isystem", sysconfig.get_path("include"),
]  # fmt: skip
_COMPILER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_bool, ctypes.c_void_p, ctypes.c_int64)


def _with_slip(file: Path) -> Path:
    """The file, or a copy with the slip that a test planted in it (``Q4METAL_SLIP``)."""
    name, text, slip = json.loads(os.environ.get("Q4METAL_SLIP", '["", "", ""]'))
    if file != ROOT / name:
        return file
    original = file.read_text()
    assert original.count(text) == 1, f"{name} has {text!r} {original.count(text)} times"
    copy = BUILD / f"slip-{os.getpid()}-{file.name}"
    copy.write_text(original.replace(text, slip))
    return copy


def _compile(name: str, files: list[Path], headers: str) -> Path:
    sources = [_with_slip(file) for file in files]
    content = "".join(source.read_text() for source in sources)
    key = hashlib.sha256(f"{_FLAGS}{torch.__version__}{headers}{content}".encode())
    target = BUILD / f"{name}-{key.hexdigest()[:20]}.o"
    if not target.exists():
        unit, partial = (target.with_suffix(f".{os.getpid()}.{end}") for end in ("cpp", "part"))
        unit.write_text("".join(f'#include "{source}"\n' for source in sources))
        folders = {f"-iquote{file.parent}" for file in files}
        _run(*_FLAGS, *folders, "-c", str(unit), "-o", str(partial))
        partial.replace(target)
        unit.unlink()
    return target


def _run(*arguments: str) -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    result = subprocess.run(
        [*compiler, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def build() -> Path:
    """The shared library: the host code, the embedded Metal text, and what stands in for torch.

    One process makes it, the others wait. Those with a slip share only what there is.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        if "Q4METAL_SLIP" not in os.environ:
            fcntl.flock(lock, fcntl.LOCK_EX)
        return _build()


def _build() -> Path:
    text = BUILD / "kernel_text.cc"
    runpy.run_path(str(ROOT / "csrc/metal/embed.py"))["write_source"](text)
    headers = "".join(
        path.read_text() for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.h"))
    )
    units = {name: [ROOT / file for file in files] for name, files in UNITS.items()}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [
            pool.submit(_compile, name, files, headers)
            for name, files in ({"text": [text]} | units).items()
        ]
    objects = [str(future.result()) for future in made]
    key = hashlib.sha256("".join(objects).encode()).hexdigest()[:20]
    target = BUILD / f"standin-{key}.so"
    if not target.exists():
        libraries = [f"-L{_TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
        partial = target.with_suffix(f".{os.getpid()}.part")
        _run("-shared", "-Wl,-z,now", *objects, *libraries, "-o", str(partial))
        partial.replace(target)
    return target


class Standin:
    """The loaded stand-in: after this ``.to("mps")`` works in this process, on Linux.

    ``native``: what torch_q4metal._C has besides on a Mac (csrc/metal/bindings.cpp); it has it here
    too from now on.
    ``mode``: "typed" or "check", the build of tests/msl that kernels are run with from now on.
    ``refusal``: what the Metal compiler answers to any text, as long as it is set.
    ``slip``: (text, wrong text) that replaces it, once, in every Metal text that has it; that was
    done ``slips`` times.
    """

    def __init__(self) -> None:
        path = build()
        torch.ops.load_library(str(path))
        self.refusal: str | None = None
        self.slip: tuple[str, str] | None = None
        self.slips = 0
        self._library = ctypes.CDLL(str(path))
        self._library.standin_set_checks.argtypes = [ctypes.c_bool]
        self.mode = "typed"
        loader = importlib.machinery.ExtensionFileLoader("standin", str(path))
        spec = importlib.util.spec_from_loader("standin", loader)
        assert spec
        self.native = importlib.util.module_from_spec(spec)
        loader.exec_module(self.native)
        for name in ("standin_fallbacks", "standin_dispatches"):
            getattr(self._library, name).restype = ctypes.c_char_p
        for name in ("allocations", "bytes", "most_bytes", "largest_upload", "uploaded"):
            getattr(self._library, f"standin_{name}").restype = ctypes.c_int64
        for name in ("DeviceMemory", "MetalDecodePlan"):
            setattr(_extension.load(), name, getattr(self.native, name))
        self._events: dict[int, int] = {}
        self._events_made = itertools.count(1)
        for name, function in self._torch_functions().items():
            setattr(torch._C, name, function)
        self._callback = _COMPILER(self._compile_metal)  # kept alive
        self._library.standin_set_compiler(self._callback)

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self._mode = mode
        self._library.standin_set_checks(mode == "check")

    def _compile_metal(self, text: bytes, checks: bool, answer: int, capacity: int) -> None:
        try:
            if self.refusal is not None:
                raise MetalCompileError(self.refusal)
            kernels = text.decode()
            if self.slip is not None and self.slip[0] in kernels:
                self.slips += 1
                kernels = kernels.replace(*self.slip, 1)
            mode = "check" if checks else "typed"
            result = str(msl_library.build(kernels, "kernel.metal", mode))
        except MetalCompileError as error:
            result = f"!{error}"
        raw = result.encode()[: capacity - 1] + b"\0"
        ctypes.memmove(answer, raw, len(raw))

    def _torch_functions(self) -> dict[str, Callable[..., object]]:
        """What torch.mps calls, of which a torch without Metal has the names only."""

        def acquire_event(enable_timing: bool) -> int:
            return next(self._events_made)

        def record_event(number: int) -> None:
            self._events[number] = self.native.record_event()

        def synchronize_event(number: int) -> None:
            committed = self.native.wait_for_event(self._events[number])
            assert committed, "the event's signal was never committed: a Mac would wait for ever"

        return {
            "_mps_acquireEvent": acquire_event,
            "_mps_releaseEvent": lambda number: self._events.pop(number, None),
            "_mps_recordEvent": record_event,
            "_mps_synchronizeEvent": synchronize_event,
            "_mps_emptyCache": lambda: None,  # it keeps nothing that was freed
            "_mps_deviceSynchronize": self.native.wait_for_all,
            "_mps_maxBufferLength": lambda: 4 << 30,
            "_mps_recommendedMaxMemory": lambda: 5 << 30,
            "_mps_driverAllocatedMemory": lambda: self.allocated_bytes(),
        }

    @contextlib.contextmanager
    def working_late(self) -> Iterator[None]:
        """Work that is queued meanwhile is done as late as a GPU may: when somebody waits."""
        self.native.set_lazy(True)
        try:
            yield
        finally:
            self.native.set_lazy(False)

    def fallbacks(self) -> list[str]:
        """Operators that ran on the CPU so far."""
        return self._library.standin_fallbacks().decode().split()

    def dispatches(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """(kernel, threads of the grid, threads of a threadgroup) of each dispatch so far."""
        lines = [line.split() for line in self._library.standin_dispatches().decode().splitlines()]
        return [(n, tuple(map(int, s[:3])), tuple(map(int, s[3:]))) for n, *s in lines]

    def plan_statistics(self) -> tuple[int, int, int]:
        """Submissions, dispatches and barriers of decode plans so far."""
        three = (ctypes.c_int64 * 3)()
        self._library.standin_plan_statistics(three)
        return tuple(three)

    @contextlib.contextmanager
    def planted(self, slip: str, number: int, index: int = 0) -> Iterator[None]:
        """A slip in each submission of a plan meanwhile.

        ``number``: of the dispatch, or with "no barrier" of the barrier, from 0. "buffers swapped":
        those bound at ``index`` and the next one; "arguments swapped": the first two numbers of the
        argument struct; "grid cut": by its last threadgroup.
        """
        plant = self._library.standin_plant
        plant(SLIPS.index(slip), ctypes.c_int64(number), index)
        try:
            yield
        finally:
            plant(0, ctypes.c_int64(0), 0)

    def allocations(self) -> int:
        """MPS buffers made so far."""
        return self._library.standin_allocations()

    def allocated_bytes(self) -> int:
        """Bytes of the MPS buffers that there are."""
        return self._library.standin_bytes()

    def most_bytes(self) -> int:
        """The most bytes that MPS buffers had together since the last call."""
        return self._library.standin_most_bytes()

    def largest_upload(self) -> int:
        """Bytes of the largest copy from the host so far."""
        return self._library.standin_largest_upload()

    def uploaded_bytes(self) -> int:
        """Bytes of all copies from the host so far."""
        return self._library.standin_uploaded()

    def waits(self) -> int:
        """How often the host waited for all that was queued, ``working_late``."""
        return self.native.waits()


class MetalDevice:
    """The GPU of the Mac that tests run on, in the place of the stand-in.

    What only the stand-in can do or tell ends a test there: it is left out, by name.
    """

    def __getattr__(self, name: str) -> object:
        pytest.skip(f"it goes on with {name!r}, which only the stand-in of tests/macos has")

    def __setattr__(self, name: str, value: object) -> None:
        if value not in ("typed", None, 0):  # how it begins
            pytest.skip(f"it sets {name!r}, which only the stand-in of tests/macos has")

    def fallbacks(self) -> list[str]:
        """Torch makes an error of an operator without a Metal kernel."""
        return []

    def working_late(self) -> contextlib.AbstractContextManager[None]:
        """A GPU does by itself."""
        return contextlib.nullcontext()

    @property
    def native(self) -> object:
        return _extension.load()


@cache
def load() -> Standin | MetalDevice:
    """What tensors on "mps" are computed by, in this process."""
    return MetalDevice() if torch.backends.mps.is_built() else Standin()
