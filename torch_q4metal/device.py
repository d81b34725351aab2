"""Where a model computes: the CPU, or the GPU of a Mac, which torch calls "mps"."""

from __future__ import annotations

import os

import torch

from . import _extension
from .errors import Q4MetalError

DEVICES = ("auto", "cpu", "mps")


def resolve_device(device: torch.device | str | None) -> torch.device:
    """What a user's ``device`` means: "auto" is mps where that is available, None is the CPU.

    Raises Q4MetalError for one that is not there, and for mps while operators could move away
    from it.
    """
    kind = "cpu" if device is None else str(device)
    if kind == "auto":
        kind = "cpu" if _why_no_mps() else "mps"
    if kind == "cpu":
        return torch.device("cpu")
    if kind not in ("mps", "mps:0"):
        raise Q4MetalError(f"device {kind!r} is not supported; use 'cpu', or 'mps' on a Mac.")
    if reason := _why_no_mps():
        raise Q4MetalError(f"device 'mps' is not available: {reason}, or use device='cpu'.")
    refuse_mps_fallback()
    return torch.device("mps")


def refuse_mps_fallback() -> None:
    """Raises Q4MetalError while torch would move operators that lack a Metal kernel to the CPU.

    A model would then be slow without a word, and torch.distributed gives wrong numbers.
    """
    value = os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK", "")
    if value.strip() not in ("", "0"):
        raise Q4MetalError(
            f"PYTORCH_ENABLE_MPS_FALLBACK={value} silently moves operators to the CPU, and makes "
            "torch.distributed wrong; unset it."
        )


def _why_no_mps() -> str:
    """What is missing, and what to do about it; empty if nothing is."""
    if not torch.backends.mps.is_available():
        return "torch finds no Metal GPU here; take a Mac with Apple silicon and macOS 14"
    if not hasattr(_extension.load(), "MetalDecodePlan"):
        return "the extension was built without Metal; build it again on this Mac"
    return ""
