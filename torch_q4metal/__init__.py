"""MLX 4-bit language models in PyTorch: weights stay packed in memory and in the operators.

Importing the package registers the operators. ``python -m torch_q4metal.<app>`` is the exception:
there torch is imported when the app needs it, so that ``--help`` answers at once.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .errors import Q4MetalError
    from .generation import generate, generate_batch, generate_step, load, stream_generate
    from .linear import Q4Embedding, Q4Linear, replace_linears
    from .models import load_model
    from .packed import load_packed
    from .sampling import SamplingParams

__version__ = "0.1.0"

_HOME = {
    "Checkpoint": "checkpoint",
    "Q4Embedding": "linear",
    "Q4Linear": "linear",
    "Q4MetalError": "errors",
    "SamplingParams": "sampling",
    "generate": "generation",
    "generate_batch": "generation",
    "generate_step": "generation",
    "load": "generation",
    "load_model": "models",
    "load_packed": "packed",
    "replace_linears": "linear",
    "stream_generate": "generation",
}

__all__ = [
    "Checkpoint",
    "Q4Embedding",
    "Q4Linear",
    "Q4MetalError",
    "SamplingParams",
    "generate",
    "generate_batch",
    "generate_step",
    "load",
    "load_model",
    "load_packed",
    "replace_linears",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # no second look-up
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def _is_app_start() -> bool:
    """Whether ``python -m torch_q4metal.<app>`` is being located: until then argv[0] is "-m"."""
    return sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv)


if not _is_app_start():
    importlib.import_module(".ops", __name__)
