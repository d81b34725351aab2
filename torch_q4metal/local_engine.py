"""Next tokens by the model of this process, drawn from its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import decode
from .models.base import CausalLM
from .text import Text


class LocalEngine:
    """The model of this process; tokens are drawn on the CPU."""

    groups = 1

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self.stages: list[dict[str, Any]] = []

    @torch.inference_mode()
    def submit(self, texts: list[Text]) -> None:
        ids, caches = [text.waiting for text in texts], [text.cache for text in texts]
        logits = decode.forward(self._model, ids, caches).cpu()
        for text, own in zip(texts, logits, strict=True):
            text.logits = own

    def draw(self, text: Text) -> tuple[int, Tensor | None]:
        assert text.logits is not None, "it was not submitted"
        return text.choice.draw(text.tokens, text.logits, text.logprobs)

    def close(self) -> None:
        """Nothing runs elsewhere."""
