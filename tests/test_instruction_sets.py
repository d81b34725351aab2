"""Every instruction set that this CPU has, forced in turn over the op table."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def available():
    """The names that the error for an unknown one lists."""
    result = run("from torch_q4metal import ops; ops.cpu_kernels()", Q4METAL_CPU="none")
    found = re.search(
        r"ValueError: Q4METAL_CPU=none is not available here; this build and CPU have: (.*)",
        result.stderr,
    )
    assert found, result.stderr
    return found.group(1).split(", ")


def test_unknown_name_is_refused_by_every_op():
    code = "import torch; from torch_q4metal import ops, reference\n"
    code += "w = reference.quantize(torch.ones(4, 64))\n"
    result = run(code + "ops.matmul(torch.ones(1, 64), *w)", Q4METAL_CPU="sse9")
    assert "Q4METAL_CPU=sse9 is not available here" in result.stderr


def test_the_best_is_chosen_and_each_can_be_forced():
    names = available()
    assert "ref" in names[-2:]  # after it at most the emulation of tiles, for tests
    show = "from torch_q4metal import ops; print(ops.cpu_kernels())"
    assert run(show, Q4METAL_CPU="").stdout.strip() == names[0]
    for name in names:
        assert run(show, Q4METAL_CPU=name).stdout.strip() == name


@pytest.mark.parametrize("name", available()[1:])  # test_ops.py itself runs under the first
def test_op_table(name):
    table = Path(__file__).with_name("test_ops.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=", str(table)],
        capture_output=True, text=True, env=os.environ | {"Q4METAL_CPU": name}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert re.search(r"\d+ passed", result.stdout)


def test_the_fast_matvec_has_the_same_bits_everywhere(tmp_path):
    """Over all formats, dtypes of scales, and widths with every kind of tail."""
    script = """
import sys, torch
from torch_q4metal import ops, reference
torch.manual_seed(0)
results = []
for columns in (32, 96, 160, 576, 640, 896, 1152, 2176):
    x = torch.randn(5, columns) * torch.logspace(-3, 3, columns)
    for group_size in reference.GROUP_SIZES:
        for bits in reference.BITS:
            if columns % group_size == 0:
                dtype = reference.FLOAT_DTYPES[(bits + group_size // 32) % 3]
                w = reference.quantize(torch.randn(19, columns).to(dtype), group_size, bits)
                for rows in (1, 2, 5):
                    results.append(ops.matmul(x[:rows], *w, None, True, group_size, bits))
torch.save(results, sys.argv[1])
"""
    files = [tmp_path / name for name in available()]
    for file in files:
        environment = os.environ | {"Q4METAL_CPU": file.name}
        subprocess.run([sys.executable, "-c", script, str(file)], env=environment, check=True)
    first, *others = [torch.load(file) for file in files]
    assert len(first) > 200
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
