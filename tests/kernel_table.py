"""Builds and runs tests/kernels: every kernel table against ref and float64, without torch."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).with_name("kernels") / "build.sh"
BUILDS = Path(__file__).resolve().parent.parent / "build"
EXTENSION_KERNELS = BUILDS / "objects" / "csrc" / "cpu"


def build(
    name: str, compiler: str, target: str = "native", flags: str = "", kernels: Path | None = None
) -> Path:
    """The program ``kernel_table`` for ``target``. Fails with what the compiler says.

    It is kept in ``build/kernels`` by ``name``, and compiled again where files changed. Object
    files in the folder ``kernels`` are linked where they are as new.
    """
    program = BUILDS / "kernels" / name
    program.parent.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        ["sh", str(SCRIPT), compiler, target, str(program)],
        env=os.environ | {"CXXFLAGS": flags, "KERNELS": str(kernels or "")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return program


def run(program: Path, *arguments: str, emulator: tuple[str, ...] = ()) -> str:
    """What the program prints: a line a table, which says whether its instructions were emulated.

    Fails if a check failed.
    """
    result = subprocess.run(
        [*emulator, str(program), *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
