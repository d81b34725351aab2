"""The .mm files type-check as Objective-C++ for macOS, with stub headers and this torch."""

import concurrent.futures
import os
import re
from pathlib import Path

import cross_compiler
import pytest
import torch

METAL = cross_compiler.ROOT / "csrc" / "metal"
INCLUDE = Path(torch.__file__).parent / "include"
FLAGS = [
    "-std=c++20", "-Wall", "-Werror=objc-method-access",
    "-isystem", str(INCLUDE), "-isystem", str(INCLUDE / "torch/csrc/api/include"),
]  # fmt: skip

# By file: (its text, what a slip makes of it, what the compiler must say). All slips of a file are
# in it at once, for each run of the compiler takes seconds.
SLIPS = {
    "library.mm": [
        ("options.languageVersion", "options.langVersion", "'langVersion' not found"),
        ("options.fastMathEnabled", "options.fastMath", "'fastMath' not found"),
        ("0u, options", "options", "no matching"),
    ],
    "sink.mm": [
        (
            "memoryBarrierWithScope:",
            "memoryBarrierWithScopes:",
            "memoryBarrierWithScopes:' not found",
        ),
        ("(id<MTLComputePipelineState>)state", "state", "of type 'const void *'"),
        ("offset:memory.offset atIndex:index", "atIndex:index", "setBuffer:atIndex:' not found"),
        ("SyncType::COMMIT)", "SyncType::SUBMIT)", "no member named 'SUBMIT'"),
    ],
}


# The SDK of the Command Line Tools on macOS 14; without the first the headers set the second.
OLD_SDK = [f"-D__MAC_OS_X_VERSION_{end}" for end in ("MIN_REQUIRED=140000", "MAX_ALLOWED=140500")]


@pytest.mark.parametrize("sdk", [[], OLD_SDK], ids=["new", "of macOS 14"])
def test_every_file_type_checks(sdk):
    files = sorted(METAL.glob("*.mm"))
    assert len(files) >= 2
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        said = list(pool.map(lambda file: cross_compiler.check_syntax(file, *FLAGS, *sdk), files))
    assert said == [""] * len(files)


def test_arc_is_refused(planted):
    """Whose calls of torch's functions are not those that torch was compiled for."""
    said = cross_compiler.check_syntax(METAL / "library.mm", *FLAGS, "-fobjc-arc")
    (line,) = [
        line for line in said.splitlines() if "without -fobjc-arc" in line and "error" in line
    ]
    planted("library.mm with ARC", line.partition("error: ")[2])


@pytest.mark.parametrize("name", SLIPS)
def test_slips_are_errors(tmp_path, planted, name):
    text = re.sub(r'#include "', f'#include "{METAL}/', (METAL / name).read_text())
    for original, slip, _ in SLIPS[name]:
        assert text.count(original) == 1
        text = text.replace(original, slip)
    source = tmp_path / name
    source.write_text(text)
    said = cross_compiler.check_syntax(source, *FLAGS)
    for original, slip, words in SLIPS[name]:
        (line,) = [line for line in said.splitlines() if "error: " in line and words in line]
        planted(f"{name}: {original} is {slip}", line.partition("error: ")[2])
