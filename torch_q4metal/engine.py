"""What computes the next tokens of texts: this process, or a pipeline of several."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from . import decode
from .decode_mps import MetalDecodePlan
from .device_engine import DeviceEngine
from .local_engine import LocalEngine
from .models.base import CausalLM
from .text import Text


class Engine(Protocol):
    """Computes in the order of ``submit``. A text has at most one pass under way.

    ``stages``  of a pipeline, what each rank has loaded: "rank", "host", "layers", "weight_bytes"
    """

    stages: list[dict[str, Any]]

    @property
    def groups(self) -> int:
        """How many passes are worth having under way at once."""

    def submit(self, texts: list[Text]) -> None:
        """Begins the next token of texts [B]: their waiting tokens go into their caches.

        Raises ContextLengthError, before anything is computed, if one has no room for them.
        """

    def draw(self, text: Text) -> tuple[int, Tensor | None]:
        """(next token, log-probabilities [V] f32 or None) of a text that was submitted.

        The token is not appended to ``tokens``.
        """

    def close(self) -> None:
        """Ends what runs elsewhere."""


def engine_of(model: CausalLM) -> Engine:
    """The pipeline that the model is a stage of, or its own process."""
    if model.engine is not None:
        return model.engine
    plan = decode.plan_of(model)
    return DeviceEngine(model, plan) if isinstance(plan, MetalDecodePlan) else LocalEngine(model)
