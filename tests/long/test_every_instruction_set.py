"""The decode plan's own tests, and ThreadSanitizer, with the kernels of every instruction set."""

import os
import re
import subprocess
import sys

import pytest
import sanitized
import test_instruction_sets

NAMES = test_instruction_sets.available()


@pytest.mark.parametrize("name", NAMES[1:])  # the tests themselves run under the first
def test_decode_plan(name):
    tests = sorted((sanitized.ROOT / "tests").glob("test_decode_plan*.py"))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=", *map(str, tests)],
        capture_output=True, text=True, env=os.environ | {"Q4METAL_CPU": name}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert re.search(r"\d+ passed", result.stdout)


def torch_free_sources():
    """What setup.py compiles on this machine, without the files that know torch or Python."""
    others = ("metal", *(("neon",) if "avx2" in NAMES else ("avx", "amx.cpp")))
    for source in re.findall(r'"(csrc/\S+\.cpp)"', (sanitized.ROOT / "setup.py").read_text()):
        text = (sanitized.ROOT / source).read_text()
        knows_torch = re.search(r"#include <(torch|ATen|pybind11|Python)", text)
        includes_it = re.search(r'#include "\S*bindings.h"', text)
        if not (knows_torch or includes_it or any(word in source for word in others)):
            yield source


@pytest.fixture(scope="module")
def program():
    return sanitized.compile_program([*torch_free_sources(), sanitized.DRIVER])


@pytest.mark.parametrize("name", NAMES)
def test_no_race_in_the_kernels(program, name):
    """Kernels that write beyond their own rows, say, whose neighbour another thread computes."""
    status, output = sanitized.watch(program, Q4METAL_CPU=name)
    assert status == 0, output
    assert "ThreadSanitizer" not in output
    status, output = sanitized.watch(program, "without", "2", Q4METAL_CPU=name)
    assert status != 0
    assert sanitized.RACE in output
