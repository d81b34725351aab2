"""Writes csrc/metal's kernels as complete .metal files, for Apple's compiler or any other.

python tests/macos/metal_texts.py FOLDER
"""

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def write(folder: Path) -> list[Path]:
    """One file a family, with kernels of every kind instantiated (list_kernels.cpp)."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "list_kernels"
    source = ROOT / "tests/macos/list_kernels.cpp"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    subprocess.run([*compiler, "-std=c++20", "-O0", str(source), "-o", str(program)], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    wanted: dict[str, set[str]] = {}
    for line in lines.splitlines():
        family, instantiation = line.split("\t")
        wanted.setdefault(family, set()).add(instantiation)
    embed = runpy.run_path(str(ROOT / "csrc/metal/embed.py"))
    assert set(wanted) == set(embed["families"]()), "list_kernels.cpp leaves a family out"
    files = []
    for family, instantiations in sorted(wanted.items()):
        files.append(folder / f"{family}.metal")
        text = embed["complete_text"](family) + "\n".join(sorted(instantiations)) + "\n"
        files[-1].write_text(text)
    return files


if __name__ == "__main__":
    for file in write(Path(sys.argv[1])):
        print(file)
