"""Compiles tests/sanitizer/decode_passes.cpp with the plan and the executor for ThreadSanitizer."""

import concurrent.futures
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitizer"
DRIVER = "tests/sanitizer/decode_passes.cpp"
PORTABLE = [
    "csrc/plan/plan.cpp",
    "csrc/cpu/executor.cpp",
    "csrc/cpu/executor_pass.cpp",
    "csrc/cpu/executor_workspace.cpp",
    "csrc/cpu/prefill.cpp",
    "csrc/cpu/threads.cpp",
    "csrc/cpu/codec.cpp",
    "csrc/cpu/ref.cpp",
    "tests/sanitizer/only_ref.cpp",
    DRIVER,
]
FLAGS = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-ffp-contract=off", "-Wno-psabi"]
RACE = "WARNING: ThreadSanitizer: data race"
_RACES_EXIT = 66


def compile_program(sources: Iterable[str]) -> Path:
    """The program ``decode_passes``. Fails with what the compiler says.

    It and its object files are kept in ``build/sanitizer`` by the hash of what goes in.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    headers = "".join(path.read_text() for path in sorted((ROOT / "csrc").rglob("*.h")))
    BUILD.mkdir(parents=True, exist_ok=True)

    def make(key: str, name: str, *arguments: str) -> str:
        target = BUILD / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}-{name}"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            command = [*compiler, *FLAGS, *arguments, "-o", str(partial)]
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            partial.replace(target)
        return str(target)

    def compile_(source: str) -> str:
        key = f"{compiler}{FLAGS}{headers}{(ROOT / source).read_text()}"
        return make(key, f"{Path(source).stem}.o", "-c", source)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_, sources))
    return Path(make(str(objects), "decode_passes", *objects, "-pthread"))


def watch(program: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """(exit status, output) of the program; the first race ends it."""
    options = {"TSAN_OPTIONS": f"halt_on_error=1:exitcode={_RACES_EXIT}"}
    command = [str(program), *arguments]

    def run(*prefix: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, *command], env=os.environ | options | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, check=False,
        )  # fmt: skip

    result = run()
    if "unexpected memory mapping" in result.stdout and shutil.which("setarch"):
        # Older runtimes cannot live with as many random address bits as newer kernels use.
        result = run("setarch", platform.machine(), "-R")
    return result.returncode, result.stdout
