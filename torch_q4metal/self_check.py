"""The start-up self-check: a known-answer test of each Metal kernel that a model will use.

    check_model(model)  # raises SelfCheckError; a fraction of a second, once a process

A compiler or a driver that gets a kernel wrong would otherwise show as text that makes no sense.
Each step of the model's decode plan, in the formats that its layers have, and each operator that
reads prompts runs on small random matrices (kernel_case.py), with at most 1 MB of data and in one
command buffer, and is compared with float64 (known_answers.py).
"""

from __future__ import annotations

import logging
import platform
import time
from dataclasses import dataclass

import torch

from .errors import Q4MetalError
from .kernel_case import KernelCase, Sizes
from .machine import cpu_name
from .model_formats import ModelFormats
from .models.base import CausalLM

logger = logging.getLogger(__name__)

LARGEST = 1_000_000
"""Bytes of data in a check."""
# The first that stays below it is taken.
_SIZES = (
    Sizes(640, 640, 1056), Sizes(640, 640, 96), Sizes(640, 256, 96), Sizes(640, 128, 96),
    Sizes(384, 128, 96), Sizes(256, 128, 96), Sizes(128, 128, 96),
)  # fmt: skip


class SelfCheckError(Q4MetalError):
    """A kernel computes wrong numbers, or does not compile, on this device."""


@dataclass(frozen=True)
class Report:
    """What was checked, with relative errors; times in seconds."""

    errors: dict[str, float]  # by kernel
    data_bytes: int
    seconds: float
    compile_seconds: float  # of those

    def __str__(self) -> str:
        return (
            f"{len(self.errors)} Metal kernels agree with float64 ({self.seconds:.2f} s, "
            f"{self.compile_seconds:.2f} s of it to compile them)"
        )


_done: set[tuple[ModelFormats, int]] = set()


def check_model(model: CausalLM, rows: int = 1) -> Report | None:
    """Checks the kernels that the model uses for so many rows (1 to 8) at once, and with 1 those
    for prompts. Models with the same formats are checked once a process: then None.

    Raises SelfCheckError, which names kernel, device and macOS version.
    """
    formats = ModelFormats.of(model)
    if (formats, rows) in _done:
        return None
    report = check(formats, rows, "mps")
    _done.add((formats, rows))
    logger.info("self-check: %s", report)
    return report


def check(formats: ModelFormats, rows: int, device: torch.device | str) -> Report:
    """Checks the kernels of these formats, whether or not that was done. Raises SelfCheckError."""
    begin, compiled = time.perf_counter(), _compile_seconds()
    try:
        case = fitting_case(formats, rows, device)
        found = case.run()
    except RuntimeError as failed:
        if "the Metal kernel " not in str(failed):  # that does not compile, or has too many threads
            raise
        raise SelfCheckError(f"{str(failed).splitlines()[0]} ({place()}).") from failed
    errors: dict[str, float] = {}
    for answer, result in found:
        error = answer.error_of(result)
        if not error <= answer.bound:  # NaN too
            raise SelfCheckError(
                f"the Metal kernel {answer.kernel} computes wrong numbers on {place()} (relative "
                f"error {error:.1e}, allowed {answer.bound:.1e}), so nothing is generated with it; "
                "use device='cpu', and report this line."
            )
        errors[answer.kernel] = max(error, errors.get(answer.kernel, 0.0))
    compiling = _compile_seconds() - compiled
    return Report(errors, case.data_bytes, time.perf_counter() - begin, compiling)


def fitting_case(formats: ModelFormats, rows: int, device: torch.device | str) -> KernelCase:
    """The largest small model with less than ``LARGEST`` bytes of data."""
    for sizes in _SIZES:
        case = KernelCase(formats, rows, sizes, device)
        if case.data_bytes <= LARGEST:
            break
    return case


def place() -> str:
    """The GPU and the macOS version, as error messages name them."""
    try:
        gpu = torch.backends.mps.get_name()
    except (AttributeError, RuntimeError):
        gpu = cpu_name()  # which names the whole chip
    return f"{gpu}, macOS {platform.mac_ver()[0] or 'unknown'}"


def _compile_seconds() -> float:
    return sum(torch.ops.q4metal.metal_compile_log()[1])
