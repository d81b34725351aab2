"""Compiles tests/sanitizer/decode_passes.cpp with the plan and the executor for ThreadSanitizer."""

import concurrent.futures
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DRIVER = "tests/sanitizer/decode_passes.cpp"
PORTABLE = [
    "csrc/plan/plan.cpp",
    "csrc/cpu/executor.cpp",
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


def compile_program(sources: Iterable[str], folder: Path) -> Path:
    """The program ``decode_passes`` in ``folder``. Fails with what the compiler says."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))

    def run(*arguments: str) -> None:
        result = subprocess.run(
            [*compiler, *FLAGS, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr

    objects = {source: str(folder / f"{Path(source).stem}.o") for source in sources}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: run("-c", source, "-o", objects[source]), objects))
    program = folder / "decode_passes"
    run(*objects.values(), "-pthread", "-o", str(program))
    return program


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
