"""The C++ compiler for Apple silicon on any machine: clang of the ziglang wheel, our stubs."""

import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import ziglang

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "macos"
STUBS = Path(__file__).resolve().parent / "stubs"
# torch's headers say of some pointers only whether they may be null.
_STUB_FLAGS = [f"-F{STUBS}", "-iframework", str(STUBS), "-Wno-nullability-completeness"]
_COMMAND = [
    sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-macos.14.0", *_STUB_FLAGS,
]  # fmt: skip


def environment() -> dict[str, str]:
    """The process's environment, with zig's cache in the build folder."""
    return _cached_in(str(BUILD / "zig"))


def _cached_in(folder: str) -> dict[str, str]:
    return os.environ | {"ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder}


def write_script(path: Path) -> None:
    """A program that takes the arguments of Apple's clang++, and compiles for arm64 only.

    Bundles are linked as dynamic libraries: zig's linker makes no bundles (0.17 crashes), and
    what is inside is the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "#!/bin/sh\n"
        "before=\n"
        "for argument; do\n"
        "    shift\n"
        '    case "$before $argument" in\n'
        '    "-arch arm64") ;;\n'
        '    "-arch "*) echo "error: there is no torch for $argument" >&2; exit 1 ;;\n'
        '    *" -arch") ;;\n'
        '    *" -bundle") set -- "$@" -shared ;;\n'
        '    *) set -- "$@" "$argument" ;;\n'
        "    esac\n"
        "    before=$argument\n"
        "done\n"
        f'exec {shlex.join(_COMMAND)} "$@"\n'
    )
    path.chmod(0o755)


@cache
def _header_flags() -> list[str]:
    """Where zig's C++ and macOS headers are and how they are configured, as it tells clang."""
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.mm"
        empty.write_text("")
        result = subprocess.run(
            [*_COMMAND, "-c", str(empty), "-o", f"{folder}/empty.o"],
            env=_cached_in(folder) | {"ZIG_VERBOSE_CC": "1"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    words = shlex.split(result.stderr)
    folders = [w for pair in pairwise(words) if pair[0] == "-isystem" for w in pair]
    return ["-nostdinc", *folders, *(w for w in words if w.startswith("-D"))]


def check_syntax(source: Path, *flags: str) -> str:
    """What clang says of an Objective-C++ file for macOS: empty if nothing.

    Without code generation, which `zig c++` cannot leave out: half the time. The answer is kept in
    ``build/macos`` by the hash of the file and of all headers that are ours.
    """
    zig = str(Path(ziglang.__file__).parent / "zig")
    command = [
        zig, "clang", "-x", "objective-c++", "-fsyntax-only", "-target", "arm64-apple-macos14.0",
        *_STUB_FLAGS, *flags,
    ]  # fmt: skip
    headers = [*(ROOT / "csrc").rglob("*.h"), *(path for path in STUBS.rglob("*.h"))]
    parts = [*command, *_versions(), *(p.read_text() for p in [source, *sorted(headers)])]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    kept = BUILD / "syntax" / f"{source.name}-{key}"
    if not kept.exists():
        result = subprocess.run(
            [*command, *_header_flags(), str(source)], capture_output=True, text=True, check=False
        )
        assert result.stderr or result.returncode == 0
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(result.stderr)
        partial.replace(kept)
    return kept.read_text()


def _versions() -> list[str]:
    """Of the compiler and of torch, whose headers are included."""
    return [metadata.version(name) for name in ("ziglang", "torch")]
