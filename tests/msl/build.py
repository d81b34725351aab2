"""Compiles Metal text into a shared object that is kept by the hash of everything that goes in.

clang (from the ziglang wheel) compiles the text, the host's C++ compiler the executor.
"""

import contextlib
import hashlib
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import ziglang

from .lexer import MetalSyntaxError
from .lint import lint
from .rewrite import rewrite

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNTIME, HOST = HERE / "runtime", HERE / "host"
_CLANG = [str(Path(ziglang.__file__).parent / "zig"), "clang", "-target", "x86_64-linux-gnu"]
# Metal 3 is C++14; its vectors don't convert by themselves.
_LANGUAGE = ["-x", "c++", "-std=c++14", "-nostdinc", "-flax-vector-conversions=none"]
# host/ takes more of C++, of which clang would warn in headers that are not the system's.
_HEADERS = ["-isystem", str(HOST)]
# Literals without suffix are float in Metal; half and bfloat round after every operation.
_MEANING = [
    "-Xclang", "-cl-single-precision-constant",
    "-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none",
    "-ffp-contract=on", "-fno-math-errno", "-march=x86-64-v3",
]  # fmt: skip
_CODE = [
    "-fPIC", "-fvisibility=hidden", "-gline-tables-only", "-fdebug-compilation-dir=.",
    "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics",
]  # fmt: skip
_WARNINGS = [
    "-Wno-everything", "-Wimplicit-float-conversion", "-Wc++17-extensions", "-Wc++20-extensions",
    "-Wc++23-extensions", "-Wc++26-extensions", "-Werror=vec-elem-size",
    "-Werror=uninitialized", "-Werror=sometimes-uninitialized", "-Werror=return-type",
    "-Werror=array-bounds",
]  # fmt: skip
_SANITIZERS = [
    "-fsanitize=thread,bounds,shift,integer-divide-by-zero,unreachable,return",
    "-fno-sanitize-recover=all",
]
# ThreadSanitizer tells of accesses up to 16 bytes only, so nothing may be vectorized beyond. A read
# just before a write of the same place would not be told of by default.
_CHECKED = [
    "-O1", "-fsanitize=thread", "-fno-vectorize", "-fno-slp-vectorize", "-mprefer-vector-width=128",
    "-mllvm", "-tsan-instrument-func-entry-exit=0",
    "-mllvm", "-tsan-instrument-read-before-write=1",
]  # fmt: skip
_RUNTIME_FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall"]
_KEPT_BUILDS = 1500
_EXECUTOR = ["executor", "dispatch", "faults", "fiber", "symbols"]
_CHECKER = ["checker", "memory", "hooks"]


class MetalCompileError(ValueError):
    """The text was rejected, by the lint or by the compiler; the first line says where and why."""


def cache_folder() -> Path:
    """Where builds are kept between runs: ``build/msl`` of the repository, or ``MSL_CACHE``."""
    return Path(os.environ.get("MSL_CACHE", ROOT / "build" / "msl"))


def name_of(path: Path) -> str:
    """The path as diagnostics have it: from the repository's root if it is in it, so that builds do
    not depend on where that lies.
    """
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def build(
    text: str, name: str, mode: str, include_dirs: Sequence[Path] = (), defines: Sequence[str] = ()
) -> Path:
    """The shared object of the Metal text ``text``, which diagnostics call ``name``.

    ``mode`` is "typed" or "check". Raises MetalCompileError.
    """
    key = hashlib.sha256()
    for part in (*_read_with_includes(text, include_dirs), name, *defines, mode, *_tool_parts()):
        key.update(part.encode() + b"\0")
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / f"{Path(name).stem}-{mode}-{key.hexdigest()[:20]}.so"
    if not result.exists():
        preprocessed = _preprocess(text, name, include_dirs, defines)
        problems = lint(preprocessed)
        if problems:
            raise MetalCompileError("\n".join(problems))
        try:
            source = "#include <metal.h>\n" + rewrite(preprocessed)
        except MetalSyntaxError as error:
            raise MetalCompileError(str(error)) from None
        _prune(folder)
        with (
            ThreadPoolExecutor(1) as beside,
            tempfile.TemporaryDirectory(dir=folder) as scratch,
        ):
            _compile(source, Path(scratch), mode, beside.submit(_runtime, mode), result)
    result.touch()
    return result


def _prune(folder: Path) -> None:
    """Removes the builds that were not used for longest, so that a year of edits stays small."""
    with contextlib.suppress(FileNotFoundError):  # another process removes them as well
        kept = sorted(folder.glob("*.so"), key=lambda f: f.stat().st_mtime)
        for old in kept[:-_KEPT_BUILDS]:
            old.unlink()


def _read_with_includes(text: str, include_dirs: Sequence[Path]) -> list[str]:
    """The text and all that it includes, by quotes, as far as it is there."""
    texts, folders, seen = [text], list(include_dirs), set()
    for found in texts:  # both lists grow
        for name in re.findall(r'(?m)^\s*#\s*include\s+"([^"]+)"', found):
            for file in [(folder / name).resolve() for folder in folders]:
                if file not in seen and file.exists():
                    seen.add(file)
                    texts.append(file.read_text())
                    folders.append(file.parent)
    return texts


def _preprocess(text: str, name: str, include_dirs: Sequence[Path], defines: Sequence[str]) -> str:
    include = [f"-I{name_of(d)}" for d in (HOST / "include", *include_dirs)]
    macros = ["-D__METAL__=1", "-D__METAL_VERSION__=310", *(f"-D{d}" for d in defines)]
    command = [*_CLANG, "-E", *_LANGUAGE, *include, *macros, "-"]
    return _run(command, f'# 1 "{name}"\n{text}').stdout


@cache
def _tool_parts() -> tuple[str, ...]:
    """Everything besides the text that a build depends on."""
    parts = (HERE / f"{name}.py" for name in ("build", "lexer", "lint", "parameters", "rewrite"))
    files = [*HOST.rglob("*"), *RUNTIME.iterdir(), *parts]
    version = subprocess.run([*_CLANG, "--version"], capture_output=True, text=True, check=True)
    return (version.stdout, *(f.read_text() for f in sorted(files) if f.is_file()))


def _run(command: list[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command, cwd=ROOT, input=text, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise MetalCompileError(_diagnosis(result.stderr))
    return result


def _diagnosis(stderr: str) -> str:
    """The compiler's words behind a line of ours: the first error, at its place in the Metal text.

    An error inside ``host/`` is one of the text that asked for it.
    """
    pattern = r"^(.+?):(\d+):\d+: (fatal error|error|note): (.*)$"
    found = re.findall(pattern, stderr, re.MULTILINE)
    first = next((i for i, f in enumerate(found) if f[2] != "note"), None)
    if first is None:
        return stderr[:6000]
    file, line = next(
        (f[:2] for f in found[first:] if not f[0].startswith((str(HOST), name_of(HOST)))),
        found[first][:2],
    )
    return f"{file}:{line}: {found[first][3]}\n{stderr[:6000]}"


def _compile(source: str, scratch: Path, mode: str, runtime: Future[str], result: Path) -> None:
    code, object_ = scratch / "kernels.cpp", scratch / "kernels.o"
    code.write_text(source)
    front = [*_CLANG, *_LANGUAGE, *_HEADERS, *_MEANING, *_CODE, *_WARNINGS]
    if mode == "typed":
        checked = _run([*front, "-O2", "-c", str(code), "-o", str(object_)])
    else:
        ir = scratch / "kernels.ll"
        checked = _run(
            [*front, "-O1", *_SANITIZERS, "-DMSL_CHECK", "-Xclang", "-disable-llvm-passes",
             "-S", "-emit-llvm", str(code), "-o", str(ir)]
        )  # fmt: skip
        text = ir.read_text()
        _reject_unseen(text)
        ir.write_text(without_address_spaces(text))
        _run([*_CLANG, *_CHECKED, "-march=x86-64-v3", "-fPIC", "-Wno-everything",
              "-c", str(ir), "-o", str(object_)])  # fmt: skip
    _reject_warnings(checked.stderr)
    library = scratch / "kernels.so"
    _run(["c++", "-shared", "-o", str(library), str(object_), runtime.result(), "-lm", "-ldl",
          "-Wl,--no-undefined", f"-Wl,--version-script={RUNTIME}/exports.map"])  # fmt: skip
    library.replace(result)


def _reject_warnings(stderr: str) -> None:
    """Metal converts float to bfloat only where the text says so; to half it does so by itself."""
    pattern = r"^(.*?):(\d+):\d+: warning: (.*?) \[-W(.*?)\]$"
    for file, line, message, flag in re.findall(pattern, stderr, re.MULTILINE):
        if flag.endswith("-extensions"):
            raise MetalCompileError(f"{file}:{line}: {message}; Metal is C++14")
        if "implicit conversion" in message and "to 'bfloat'" in message:
            raise MetalCompileError(f"{file}:{line}: {message}; write bfloat(...)")


def _reject_unseen(ir: str) -> None:
    """What Metal rejects and clang takes, or what the checker would not see."""
    problems = {
        # Metal may round it once or twice, as it likes.
        r"@llvm\.fmuladd\.": "a product and a sum in one statement; write fma(...)",
        # Written out; clang rejects the implicit ones.
        r"= addrspacecast ": "a cast from one address space to another",
        # ThreadSanitizer has no hook for them.
        r"(?:load|store) <[34] x i64>.*addrspace\(\d\)": "the check build can't watch long3, long4",
    }
    for pattern, problem in problems.items():
        for number in re.findall(rf"{pattern}.*!dbg (!\d+)", ir):
            place = _place(ir, number)
            if not place.startswith((str(HOST), name_of(HOST))):
                raise MetalCompileError(f"{place}: {problem}")


def _place(ir: str, number: str) -> str:
    """``file:line`` of the debug location ``number``."""
    location = scope = _metadata(ir, number)
    while "file: " not in scope:
        scope = _metadata(ir, re.findall(r"scope: (!\d+)", scope)[0])
    file = re.findall(r'filename: "(.*?)"', _metadata(ir, re.findall(r"file: (!\d+)", scope)[0]))
    line = re.findall(r"line: (\d+)", location)
    return f"{file[0]}:{line[0]}"


def _metadata(ir: str, number: str) -> str:
    start = ir.index(f"\n{number} = ") + 1
    return ir[start : ir.index("\n", start)]


def _runtime(mode: str) -> str:
    """The executor's object file for ``mode``, compiled in one piece: 3 s instead of 12."""
    key = hashlib.sha256(
        "\0".join([*_RUNTIME_FLAGS, *(f.read_text() for f in sorted(RUNTIME.iterdir()))]).encode()
    )
    target = cache_folder() / f"runtime-{mode}-{key.hexdigest()[:20]}.o"
    if not target.exists():
        parts = _EXECUTOR + (_CHECKER if mode == "check" else [])
        text = "".join(f'#include "{RUNTIME}/{name}.cpp"\n' for name in parts)
        macros = ["-DMSL_CHECK"] if mode == "check" else []
        partial = target.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        _run(["c++", *_RUNTIME_FLAGS, *macros, "-x", "c++", "-c", "-", "-o", str(partial)], text)
        partial.replace(target)
    return str(target)


def host_library(source: str, name: str, include_dir: Path) -> Path:
    """The shared object of C++ for the host that includes headers of ``include_dir``."""
    headers = sorted([*include_dir.glob("*.h"), *include_dir.parent.glob("*.h")])
    key = hashlib.sha256("\0".join([source, *(f.read_text() for f in headers)]).encode())
    target = cache_folder() / f"{name}-{key.hexdigest()[:20]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
        command = ["c++", *flags, f"-I{include_dir}", "-x", "c++", "-", "-o", str(partial)]
        _run(command, source)
        partial.replace(target)
    target.touch()
    return target


def without_address_spaces(ir: str) -> str:
    """LLVM IR with the default address space only: ThreadSanitizer skips the others."""
    ir = re.sub(r"addrspace\([123]\) ?", "", ir)
    ir = re.sub(r"addrspacecast \(ptr ([^()]*?) to ptr\)", r"\1", ir)
    ir = re.sub(r"(%[\w.]+) = addrspacecast ptr (\S+) to ptr", r"\1 = bitcast ptr \2 to ptr", ir)
    ir = re.sub(
        r"(@llvm\.[\w.]*?)((?:\.p[0123])+)", lambda m: m[1] + re.sub("[123]", "0", m[2]), ir
    )
    # Two declarations of one intrinsic may have become equal.
    seen, lines = set(), []
    for line in ir.split("\n"):
        if line.startswith("declare "):
            name = re.search(r"@([\w.]+)", line)
            if name and name[1] in seen:
                continue
            seen.add(name[1] if name else "")
        lines.append(line)
    return "\n".join(lines)
