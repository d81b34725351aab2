"""The NEON kernels, cross-compiled with zig and run by qemu: no ARM machine is needed."""

import re
import shutil
import sys

import kernel_table
import pytest

pytestmark = pytest.mark.timeout(1200)  # libc++ is compiled, and the CPU emulated


@pytest.fixture(scope="module")
def program():
    return kernel_table.build("neon", f"{sys.executable} -m ziglang c++", "aarch64-linux-musl")


def run(program, cpu, *arguments):
    emulator = shutil.which("qemu-aarch64")
    assert emulator, "qemu-aarch64 is missing: make test-system installs it"
    return kernel_table.run(program, *arguments, emulator=(emulator, "-cpu", cpu))


def verdict_of(output):
    return re.findall(r"^(\S+): ok \((?:native|emulated)\)", output, re.MULTILINE)


def test_every_table(program, record_property):
    """On a CPU with the matrix products of i8mm, for which the GEMMs have a variant."""
    output = run(program, "max", "--quick")
    record_property("tables", output)
    assert verdict_of(output) == ["ref", "neon", "amx-emulated"]


def test_with_dot_products_only(program):
    assert verdict_of(run(program, "neoverse-n1", "--quick", "neon")) == ["neon"]


def test_a_cpu_without_dot_products_is_recognized(program):
    assert "neon unsupported" in run(program, "cortex-a53", "--list").splitlines()
