"""An extension that does not fit, or is not there, is one sentence with its cure."""

import json
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import torch_q4metal

PACKAGE = Path(torch_q4metal.__file__).parent


@pytest.mark.parametrize(
    ("stamp", "sentence"),
    [
        (
            {"torch": "2.12.1+cpu"},
            f"was built for torch 2.12.1+cpu, but torch {torch.__version__} is installed",
        ),
        (None, "is not built"),
        ({"torch": torch.__version__}, "does not load"),
    ],
)
def test_import_error_is_one_sentence(tmp_path, stamp, sentence):
    copy = tmp_path / "torch_q4metal"
    shutil.copytree(
        PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    )
    (copy / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    if stamp is not None:
        (copy / "_build.json").write_text(json.dumps(stamp))
    result = subprocess.run(
        [sys.executable, "-c", "import torch_q4metal"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert sentence in last
    assert "pip install --no-build-isolation" in last


def test_apps_start_without_torch():
    """Only ``python -m torch_q4metal.<app>`` skips torch; a plain import registers the ops."""
    code = "import sys, torch_q4metal; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "True\n"
    )
    for app in ("chat", "bench", "convert", "doctor"):
        result = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", f"torch_q4metal.{app}", "--help"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-500:]
        assert "Usage:" in result.stdout
        assert not [
            line
            for line in result.stderr.splitlines()
            if line.rpartition("|")[2].strip() == "torch"
        ]
