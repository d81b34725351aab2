"""The config fields that all decoder families share, read and checked once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .fields import Fields
from .rope import RopeConfig


@dataclass(frozen=True)
class DecoderConfig:
    """Shapes and constants of a decoder, named as in ``config.json``.

    ``tied``: the head is the embedding's table. ``sliding_window``: some layer looks back that many
    tokens only; None where all layers see all.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    vocab_size: int
    max_position_embeddings: int
    rope: RopeConfig
    tied: bool
    sliding_window: int | None


def common_fields(fields: Fields, *, default_theta: float, default_context: int) -> dict[str, Any]:
    """Values for ``DecoderConfig``, all but ``tied`` and ``sliding_window``.

    ``default_theta`` and ``default_context`` are for configs that say nothing. Raises ConfigError.
    """
    fields.refuse_unbuilt()
    hidden_size = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads evenly."
        )
    if hidden_size % heads and fields.raw.get("head_dim") is None:
        raise ConfigError(
            f"config.json: hidden_size {hidden_size} is no multiple of {heads} attention heads, "
            "and there is no head_dim."
        )
    head_dim = fields.integer("head_dim", hidden_size // heads)
    context = fields.integer("max_position_embeddings", default_context)
    return {
        "model_type": str(fields.model_type),
        "hidden_size": hidden_size,
        "num_hidden_layers": fields.integer("num_hidden_layers"),
        "intermediate_size": fields.integer("intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("rms_norm_eps"),
        "vocab_size": fields.integer("vocab_size"),
        "max_position_embeddings": context,
        "rope": RopeConfig.from_raw(
            fields.raw,
            head_dim=head_dim,
            max_position_embeddings=context,
            default_theta=default_theta,
        ),
    }


def narrowest_window(layer_types: Iterable[object], window: object) -> int | None:
    """``window`` if a layer is a sliding one, else None. Raises ConfigError for unbuilt kinds."""
    sliding = False
    for kind in layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"config.json: layer_types has {kind!r}, which is not built; full_attention is."
            )
        sliding = sliding or kind == "sliding_attention"
    if not sliding:
        return None
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ConfigError(f"config.json: sliding layers need a sliding_window, not {window!r}.")
    return window
