"""Compiled Metal kernels as a Python object: ``compile`` and ``Library.run``."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .build import build, name_of

_ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
_READ_ONLY, _UNWRITTEN = 1, 2
_PREFERRED_ALIGNMENT = 256


class MetalRunError(RuntimeError):
    """A dispatch failed, or the check build found a fault: one line, the kernel's name first."""


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("size", ctypes.c_uint64),
        ("flags", ctypes.c_uint32), ("reserved", ctypes.c_uint32),
    ]  # fmt: skip


class _Constant(ctypes.Structure):
    _fields_ = [("index", ctypes.c_uint32), ("size", ctypes.c_uint32), ("value", ctypes.c_void_p)]


class _Range(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_uint64), ("end", ctypes.c_uint64)]


class _Parameter(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p), ("declaration", ctypes.c_char_p), ("index", ctypes.c_uint32),
        ("is_const", ctypes.c_uint32), ("size", ctypes.c_uint32), ("optional", ctypes.c_uint32),
    ]  # fmt: skip


class _Dispatch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p), ("threads", ctypes.c_uint32 * 3),
        ("threads_per_threadgroup", ctypes.c_uint32 * 3), ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_uint32), ("resident_count", ctypes.c_uint32),
        ("resident", ctypes.POINTER(_Buffer)), ("constants", ctypes.POINTER(_Constant)),
        ("constant_count", ctypes.c_uint32), ("threadgroup_bytes_count", ctypes.c_uint32),
        ("threadgroup_bytes", ctypes.POINTER(ctypes.c_uint32)), ("order", ctypes.c_uint32),
        ("seed", ctypes.c_uint32), ("switches", ctypes.c_uint64), ("barriers", ctypes.c_uint64),
        ("threadgroup_memory", ctypes.c_uint64), ("error", ctypes.c_char * 1024),
    ]  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """A ``[[buffer(index)]]`` of a kernel; ``size`` is the bytes of a reference's type, else 0."""

    name: str
    declaration: str
    index: int
    is_const: bool
    size: int
    optional: bool


@dataclass(frozen=True)
class Unwritten:
    """An array whose content means nothing yet: in the check build reading it is an error."""

    array: np.ndarray


@dataclass(frozen=True)
class Run:
    """What a dispatch did. ``read``, ``written`` (check build): byte ranges by buffer number."""

    switches: int
    barriers: int
    threadgroup_memory: int
    read: dict[int, list[tuple[int, int]]]
    written: dict[int, list[tuple[int, int]]]


Argument = np.ndarray | Unwritten | tuple[np.ndarray, int] | bytes | int | float | None


def compile(
    source: str | Path | Sequence[str | Path],
    mode: str = "typed",
    include_dirs: Sequence[str | Path] = (),
    defines: Sequence[str] = (),
) -> "Library":
    """Compiles .metal files (paths) or Metal text (a string with a line break) into a ``Library``.

    ``mode``: "typed" runs fast and has Metal's type errors; "check" also watches every access.
    Raises MetalCompileError.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    text, name = "", ""
    for part in sources:
        if isinstance(part, str) and "\n" in part:
            text += f'# 1 "text.metal"\n{part}\n'
            name = name or "text.metal"
        else:
            shown = name_of(Path(part))
            text += f'# 1 "{shown}"\n{Path(part).read_text()}\n'
            name = name or shown
    folders = [Path(p).resolve() for p in include_dirs]
    folders += [p.resolve().parent for p in map(Path, (s for s in sources if "\n" not in str(s)))]
    return Library(build(text, name, mode, folders, defines))


class Library:
    """The kernels of one build. ``path``: the shared object, for users of the C interface."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.msl_kernel_name.restype = ctypes.c_char_p
        self._library.msl_parameter_get.restype = ctypes.POINTER(_Parameter)
        self.checks = bool(self._library.msl_checks())
        self.parameters = {
            self._library.msl_kernel_name(k).decode(): self._parameters(k)
            for k in range(self._library.msl_kernel_count())
        }

    @property
    def kernels(self) -> list[str]:
        """Host names of the kernels."""
        return list(self.parameters)

    def _parameters(self, kernel: int) -> list[Parameter]:
        count = self._library.msl_parameter_count(kernel)
        raw = [self._library.msl_parameter_get(kernel, i).contents for i in range(count)]
        return [
            Parameter(
                p.name.decode(),
                p.declaration.decode(),
                p.index,
                bool(p.is_const),
                p.size,
                bool(p.optional),
            )
            for p in raw
        ]

    def run(
        self,
        kernel: str,
        threadgroups: int | Sequence[int] | None,
        threads_per_threadgroup: int | Sequence[int],
        buffers: Sequence[Argument] | Mapping[int | str, Argument],
        *,
        threads: int | Sequence[int] | None = None,
        constants: Mapping[int | str, bool | int | float | np.generic] | None = None,
        threadgroup_bytes: Sequence[int] = (),
        resident: Sequence[np.ndarray] = (),
        order: str = "forward",
        seed: int = 0,
    ) -> Run:
        """Runs ``kernel`` to its end on the memory of ``buffers``, which it changes in place.

        ``buffers``: by number, or a mapping from number or parameter name. Each is a contiguous
        array, a pair (array, first element), ``Unwritten(array)``, ``bytes`` (as setBytes), a
        number where the kernel has a reference, or None (not bound). The grid is ``threadgroups``
        or, as dispatchThreads counts it, ``threads``. ``constants``: function constants by number
        or name; a Python bool, int or float is passed as that, a numpy scalar as what it is.
        ``order``: "forward", "reverse" or "shuffled" (by ``seed``). Raises MetalRunError, and
        KeyError for an unknown kernel.
        """
        known = self.parameters[kernel]
        group = _three(threads_per_threadgroup)
        grid = _grid(threadgroups, threads, group)
        keep: list[object] = []
        by_number = self._by_number(known, buffers)
        count = max(by_number, default=-1) + 1
        bound = (_Buffer * max(count, 1))()
        for n, argument in by_number.items():
            bound[n] = _bind(argument, next((p for p in known if p.index == n), None), keep)
        extra = (_Buffer * max(len(resident), 1))(*(_bind(a, None, keep) for a in resident))
        values = [self._constant(k, v, keep) for k, v in (constants or {}).items()]
        dispatch = _Dispatch(
            kernel=kernel.encode(), threads=(ctypes.c_uint32 * 3)(*grid),
            threads_per_threadgroup=(ctypes.c_uint32 * 3)(*group),
            buffers=bound, buffer_count=count,
            resident=extra, resident_count=len(resident),
            constants=(_Constant * max(len(values), 1))(*values), constant_count=len(values),
            threadgroup_bytes=(ctypes.c_uint32 * 8)(*threadgroup_bytes[:8]),
            threadgroup_bytes_count=len(threadgroup_bytes), order=_ORDERS[order], seed=seed,
        )  # fmt: skip
        if self._library.msl_run(ctypes.byref(dispatch)):
            raise MetalRunError(dispatch.error.decode(errors="replace"))
        numbers = [n for n in range(count + len(resident)) if self.checks]
        return Run(
            dispatch.switches, dispatch.barriers, dispatch.threadgroup_memory,
            {n: self._touched(n, 0) for n in numbers}, {n: self._touched(n, 1) for n in numbers},
        )  # fmt: skip

    def _by_number(
        self, known: list[Parameter], buffers: Sequence[Argument] | Mapping[int | str, Argument]
    ) -> dict[int, Argument]:
        if not isinstance(buffers, Mapping):
            return dict(enumerate(buffers))
        names = {p.name: p.index for p in known}
        return {names[k] if isinstance(k, str) else k: v for k, v in buffers.items()}

    def _constant(self, key: int | str, value: object, keep: list[object]) -> _Constant:
        index = self._library.msl_constant_find(key.encode()) if isinstance(key, str) else key
        if index < 0:
            raise KeyError(f"no function constant '{key}'")
        kinds = {bool: np.bool_, int: np.int32, float: np.float32}
        array = np.array(kinds[type(value)](value) if type(value) in kinds else value)
        keep.append(array)
        return _Constant(index, array.nbytes, array.ctypes.data)

    def _touched(self, n: int, written: int) -> list[tuple[int, int]]:
        count = self._library.msl_touched(n, written, None, 0)
        ranges = (_Range * max(count, 1))()
        self._library.msl_touched(n, written, ranges, count)
        return [(r.begin, r.end) for r in ranges[:count]]


def _grid(
    threadgroups: int | Sequence[int] | None, threads: int | Sequence[int] | None, group: list[int]
) -> list[int]:
    """The grid in threads."""
    if threads is not None and threadgroups is None:
        return _three(threads)
    if threadgroups is None or threads is not None:
        raise TypeError("the grid is given either in threadgroups or in threads")
    return [g * t for g, t in zip(_three(threadgroups), group)]


def _three(size: int | Sequence[int]) -> list[int]:
    return [*([size] if isinstance(size, int) else size), 1, 1][:3]


_SCALARS = {
    "float": np.float32, "half": np.float16, "int": np.int32, "int32_t": np.int32,
    "uint": np.uint32, "uint32_t": np.uint32, "bool": np.bool_, "long": np.int64,
    "int64_t": np.int64, "ulong": np.uint64, "uint64_t": np.uint64, "ushort": np.uint16,
    "short": np.int16, "uchar": np.uint8,
}  # fmt: skip


def _bind(argument: Argument, parameter: Parameter | None, keep: list[object]) -> _Buffer:
    flags = _UNWRITTEN if isinstance(argument, Unwritten) else 0
    first = 0
    if isinstance(argument, Unwritten):
        argument = argument.array
    if argument is None:
        return _Buffer(None, 0, 0, 0)
    if isinstance(argument, tuple):
        argument, first = argument
    if isinstance(argument, bytes):
        argument = _aligned(np.frombuffer(argument, np.uint8))
    elif isinstance(argument, int | float):
        words = parameter.declaration.replace("&", " ").split() if parameter else []
        kind = next((_SCALARS[w] for w in words if w in _SCALARS), None)
        if kind is None or not parameter or not parameter.size:
            raise TypeError(
                f"a number can't be bound to {parameter.declaration if parameter else 'nothing'}"
            )
        argument = np.array([argument], kind)
    array = np.asarray(argument)
    if not array.flags.c_contiguous:
        raise ValueError(f"buffers are contiguous arrays, got strides {array.strides}")
    if not array.flags.writeable:
        flags |= _READ_ONLY
    keep.append(array)
    offset = first * array.itemsize
    return _Buffer(array.ctypes.data + offset, array.nbytes - offset, flags, 0)


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy at an address as round as a device buffer's."""
    raw = np.empty(array.nbytes + _PREFERRED_ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _PREFERRED_ALIGNMENT
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
