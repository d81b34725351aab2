"""Loads the compiled extension; importing it registers ``torch.ops.q4metal``."""

import functools
import json
from pathlib import Path
from types import ModuleType

import torch

_REBUILD = (
    "rebuild it with: "
    "pip install --no-build-isolation --force-reinstall --no-deps <the torch_q4metal source>"
)


@functools.cache
def load() -> ModuleType:
    """The extension module; ImportError, in one sentence, where it is missing or unfit."""
    stamp = Path(__file__).with_name("_build.json")
    try:
        built_for = json.loads(stamp.read_text())["torch"]
    except (OSError, ValueError, KeyError):
        raise ImportError(
            f"the extension of torch_q4metal is not built ({stamp} is missing); {_REBUILD}"
        ) from None
    if _minor(built_for) != _minor(torch.__version__):
        raise ImportError(
            f"torch_q4metal was built for torch {built_for}, but torch {torch.__version__} is "
            f"installed; {_REBUILD}"
        )
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(
            f"the extension of torch_q4metal does not load ({error}); {_REBUILD}"
        ) from error
    return _C


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
