"""Next tokens by the model of this process, drawn from its logits."""

from __future__ import annotations

from typing import Any

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

    def submit(self, texts: list[Text]) -> None:
        ids, caches = [text.waiting for text in texts], [text.cache for text in texts]
        if all(text.takes_likeliest for text in texts):
            for text, token in zip(texts, decode.likeliest(self._model, ids, caches), strict=True):
                text.next_token = token
            return
        logits = decode.forward(self._model, ids, caches)
        for index, text in enumerate(texts):
            text.next_token, text.logits = None, logits[index]

    def draw(self, text: Text) -> tuple[int, Tensor | None]:
        if text.next_token is not None:
            return text.next_token, None
        assert text.logits is not None, "it was not submitted"
        return text.choice.draw(text.tokens, text.logits, text.logprobs)

    def close(self) -> None:
        """Nothing runs elsewhere."""
