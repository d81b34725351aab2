"""Every instruction set that this CPU has, forced in turn over the op table."""

import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import torch

from torch_q4metal import ops, reference

OP_TABLE = Path(__file__).with_name("test_ops.py")


def products():
    """Over all formats, dtypes of scales, and widths with every kind of tail."""
    torch.manual_seed(0)
    for columns in (32, 96, 160, 576, 640, 896, 1152, 2176):
        x = torch.randn(5, columns) * torch.logspace(-3, 3, columns)
        for group_size in reference.GROUP_SIZES:
            for bits in reference.BITS:
                if columns % group_size == 0:
                    dtype = reference.FLOAT_DTYPES[(bits + group_size // 32) % 3]
                    w = reference.quantize(torch.randn(19, columns).to(dtype), group_size, bits)
                    for rows in (1, 2, 5):
                        yield ops.matmul(x[:rows], *w, None, True, group_size, bits)


def run_set(name, table, file, output):
    """Saves what the kernels ``name`` say and compute, and runs a table of tests."""
    os.environ["Q4METAL_CPU"] = name
    with output.open("w") as said, redirect_stdout(said), redirect_stderr(said):
        torch.save((ops.cpu_kernels(), list(products())), file)
        status = pytest.main(["-o", "addopts=", str(table)]) if table else 0
    sys.exit(int(status))


@cache
def refusal():
    code = "import torch; from torch_q4metal import ops, reference\n"
    code += "w = reference.quantize(torch.ones(4, 64))\n"
    code += "ops.matmul(torch.ones(1, 64), *w)"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=os.environ | {"Q4METAL_CPU": "none"},
    ).stderr  # fmt: skip


def available():
    """The names that the error for an unknown one lists."""
    found = re.search(
        r"InstructionSetError: Q4METAL_CPU=none is not available here; "
        r"this build and CPU have: (.*)",
        refusal(),
    )
    assert found, refusal()
    return found.group(1).split(", ")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """name, "" where none is forced -> (what cpu_kernels says, the bits of many products).

    Each is of a process of its own, which has passed the op table unless none was forced: on Linux
    a fork of one that has imported torch and computed nothing.
    """
    folder = tmp_path_factory.mktemp("sets")
    # Apple's Accelerate, which torch and numpy have on a Mac, is not safe to use after a fork.
    method = "spawn" if sys.platform == "darwin" else "forkserver"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["torch", "pytest", "hypothesis"])

    def result(name):
        table = OP_TABLE if name else ""  # this process runs the table under the best set
        file, output = folder / f"results-{name}.pt", folder / f"output-{name}.txt"
        process = context.Process(target=run_set, args=(name, table, file, output))
        process.start()
        process.join()
        said = output.read_text()
        assert process.exitcode == 0, f"{name}: {said}"
        assert not table or re.search(r"\d+ passed", said)
        return torch.load(file)

    names = ["", *available()[1:]]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(result, names), strict=True))


def test_an_unknown_name_is_refused_with_those_that_there_are():
    assert "ref" in available()[-2:]  # after it at most the emulation of tiles, for tests


def test_the_best_is_chosen_and_each_other_can_be_forced(results):
    assert [chosen for chosen, _ in results.values()] == available()


def test_the_fast_matvec_has_the_same_bits_everywhere(results):
    (_, first), *others = results.values()
    assert len(first) > 200
    for _, other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
