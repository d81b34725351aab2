"""Which part of a model a pipeline stage holds."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Part:
    """The layers ``layers`` of a model of ``total``; the embedding comes with the first of all
    layers, final norm and head with the last. ``tied``: the head is the embedding's table, which
    both ends then hold.
    """

    layers: range
    total: int
    tied: bool

    @property
    def embeds(self) -> bool:
        """Whether its input is token ids; otherwise it is the residual stream."""
        return self.layers.start == 0

    @property
    def has_head(self) -> bool:
        """Whether its output is logits; otherwise it is the residual stream."""
        return self.layers.stop == self.total

    @property
    def has_table(self) -> bool:
        """Whether it holds ``embed_tokens``, for either use."""
        return self.embeds or (self.has_head and self.tied)

    @property
    def is_whole(self) -> bool:
        return self.embeds and self.has_head

    def owns(self, name: str) -> bool:
        """Whether the tensor ``name`` belongs to it.

        What belongs nowhere is the first part's, so that it is refused as in a whole model.
        """
        if (layer := _LAYER.match(name)) and int(layer[1]) < self.total:
            return int(layer[1]) in self.layers
        if name.startswith("model.embed_tokens."):
            return self.has_table
        if name.startswith(("model.norm.", "lm_head.")):
            return self.has_head
        return self.embeds
