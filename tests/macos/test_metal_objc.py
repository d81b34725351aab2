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
    "-std=c++20", "-Wall", "-fobjc-arc", "-Werror=objc-method-access",
    "-isystem", str(INCLUDE), "-isystem", str(INCLUDE / "torch/csrc/api/include"),
]  # fmt: skip

# (file, its text, what a slip makes of it, what the compiler must say)
SLIPS = [
    (
        "library.mm",
        "options.languageVersion",
        "options.langVersion",
        "property 'langVersion' not found",
    ),
    ("library.mm", "MTLMathModeSafe", "MTLMathModeExact", "undeclared identifier"),
    ("library.mm", "0u, options", "options", "no matching"),
]


def test_every_file_type_checks():
    files = sorted(METAL.glob("*.mm"))
    assert len(files) >= 2
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        said = list(pool.map(lambda file: cross_compiler.check_syntax(file, *FLAGS), files))
    assert said == [""] * len(files)


@pytest.mark.parametrize(("name", "text", "slip", "words"), SLIPS, ids=[s[2] for s in SLIPS])
def test_a_slip_is_an_error(tmp_path, name, text, slip, words):
    original = (METAL / name).read_text()
    assert text in original
    source = tmp_path / name
    changed = original.replace(text, slip)
    source.write_text(re.sub(r'#include "', f'#include "{METAL}/', changed))
    assert words in cross_compiler.check_syntax(source, *FLAGS)
