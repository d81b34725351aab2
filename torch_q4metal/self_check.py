"""The start-up self-check: a known-answer test of each Metal kernel that a model will use.

    check_plan(ModelFormats.of(model), 1)  # raises SelfCheckError; takes a fraction of a second
    check_modules(ModelFormats.of(model), "layers", 1)  # where modules decode

A compiler or a driver that gets a kernel wrong would otherwise show as text that makes no sense.
Each step of the model's decode plan, in the formats that its layers have (plan_case.py), and each
operator that its modules call (operator_case.py) runs on small random matrices, with at most 1 MB
of data and in one command buffer, and is compared with float64 (known_answers.py). Kernels for more
rows than one are checked before the first pass of so many. Each once a process.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .errors import Q4MetalError
from .known_answers import Answer
from .machine import cpu_name
from .model_formats import Format, ModelFormats
from .models.base import MATVEC_ROWS
from .operator_case import PROMPT_ROWS, OperatorCase
from .plan_case import PlanCase
from .small_model import Sizes, SmallModel

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


_done: set[tuple[ModelFormats, str, int]] = set()
_PROMPT = MATVEC_ROWS + 1  # stands for all numbers of rows that go through the matmul


def check_plan(formats: ModelFormats, rows: int) -> Report | None:
    """Checks the kernels of a model's decode plan for so many rows (1 to 8) at once, and with 1
    those of the modules that read prompts, unless that was done in this process.

    Raises SelfCheckError, which names kernel, device and macOS version.
    """
    if (formats, "plan", rows) in _done:
        return None
    report = check(formats, rows)
    _done.add((formats, "plan", rows))
    if rows == 1:
        _done.update({(formats, "layers", _PROMPT), (formats, "head", 1)})
    logger.info("self-check: %s", report)
    return report


def check_modules(formats: ModelFormats, part: str, rows: int) -> Report | None:
    """Checks the kernels that modules call for ``rows`` tokens at once, unless that was done.

    ``part``  "layers", with the embedding, or "head"
    Raises SelfCheckError.
    """
    rows = min(rows, _PROMPT)
    if (formats, part, rows) in _done:
        return None
    forms = formats.layer_products if part == "layers" else formats.head_products
    counts = PROMPT_ROWS if rows == _PROMPT else (rows,)
    products = [(form, count) for form in forms for count in counts]
    report = _run(lambda: _fitting_case(formats, 0, products, part == "layers"))
    _done.add((formats, part, rows))
    if report.errors:
        logger.info("self-check: %s", report)
    return report


def check(formats: ModelFormats, rows: int) -> Report:
    """As ``check_plan``, whether or not that was done."""
    products: list[tuple[Format, int]] = []
    if rows == 1:
        products = [(form, count) for form in formats.layer_products for count in PROMPT_ROWS]
        products += [(form, 1) for form in formats.head_products]
    return _run(lambda: _fitting_case(formats, rows, products, rows == 1))


class Case:
    """Kernels that are checked together. ``data_bytes``: of all tensors on the device."""

    def __init__(self, model: SmallModel, plan: PlanCase | None, operators: OperatorCase) -> None:
        self._plan, self._operators = plan, operators
        self.data_bytes = model.moved_bytes + (0 if plan is None else plan.plan_bytes)

    def run(self) -> list[tuple[Answer, torch.Tensor]]:
        """Each answer with what the device gave, on the CPU."""
        if self._plan is not None:
            self._plan.prepare()
        made = self._operators.queue()  # not handed over before somebody waits
        if self._plan is not None:
            self._plan.queue()
        found = [(answer, result.cpu()) for answer, result in made]
        return found if self._plan is None else found + self._plan.results()


def _fitting_case(
    formats: ModelFormats, plan_rows: int, products: list[tuple[Format, int]], embeds: bool
) -> Case:
    """The largest that has at most ``LARGEST`` bytes. ``plan_rows``: 0 for no plan."""
    for sizes in _SIZES:
        model = SmallModel(formats, sizes, torch.device("mps"))
        plan = PlanCase(model, plan_rows) if plan_rows else None
        case = Case(model, plan, OperatorCase(model, products, embeds=embeds))
        if case.data_bytes <= LARGEST:
            break
    return case


def _run(make: Callable[[], Case]) -> Report:
    begin, compiled = time.perf_counter(), _compile_seconds()
    try:
        case = make()
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


def place() -> str:
    """The GPU and the macOS version, as error messages name them."""
    try:
        gpu = torch.backends.mps.get_name()
    except (AttributeError, RuntimeError):
        gpu = cpu_name()  # which names the whole chip
    return f"{gpu}, macOS {platform.mac_ver()[0] or 'unknown'}"


def _compile_seconds() -> float:
    return sum(torch.ops.q4metal.metal_compile_log()[1])
