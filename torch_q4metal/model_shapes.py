"""Sizes of models whose speed is predicted and measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama or Qwen2 model with one format for its layers; the head may have more bits.

    ``layers`` and ``vocabulary`` may be cut, to measure a part of a model.
    """

    name: str
    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    group_size: int = 64
    bits: int = 4
    head_bits: int = 4

    @property
    def layer_bytes(self) -> int:
        attention = self.head_dim * (2 * self.heads + 2 * self.kv_heads) * self.hidden
        weights = attention + 3 * self.hidden * self.intermediate
        return self._bytes(weights, self.bits)

    @property
    def head_bytes(self) -> int:
        return self._bytes(self.vocabulary * self.hidden, self.head_bits)

    @property
    def weight_bytes(self) -> int:
        """That one token reads, but for the row of the embedding and the norms."""
        return self.layers * self.layer_bytes + self.head_bytes

    @property
    def file_bytes(self) -> int:
        return self.weight_bytes + (0 if self.tied else self.head_bytes)

    def _bytes(self, weights: int, bits: int) -> int:
        # Codes, and a scale and a bias of 16 bits for each group.
        return weights * bits // 8 + 4 * weights // self.group_size


MODELS = (
    ModelShape(
        "SmolLM2-135M", "llama", 576, 1536, 30, 9, 3, 64, 49152, True, group_size=32, head_bits=8
    ),
    ModelShape("Qwen2.5-0.5B", "qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    ModelShape("Qwen2.5-1.5B", "qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    ModelShape("Qwen2.5-7B", "qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
    ModelShape("Llama-3.1-8B", "llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
)
"""The built-in model as it is, the others with 4 bits and group size 64 everywhere."""
