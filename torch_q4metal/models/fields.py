"""Typed reading of ``config.json``, and refusal of what it asks for that is not built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

_OFF = (None, False)
_ONE = (None, False, 1)

# Fields by which other models of these shapes differ, with the values that change nothing. A config
# that sets one to something else would load here and write nonsense.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention_multiplier": _OFF,
    "attn_logit_softcapping": _OFF,
    "attn_temperature_tuning": _OFF,
    "clip_qkv": _OFF,
    "embedding_multiplier": _ONE,
    "final_logit_softcapping": _OFF,
    "hidden_act": (None, "silu", "swish"),
    "hidden_activation": (None, "silu", "swish"),
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "no_rope_layer_interval": (*_OFF, 0),
    "num_experts": (*_OFF, 0),
    "num_local_experts": (*_OFF, 0),
    "parallel_residual": _OFF,
    "partial_rotary_factor": _ONE,
    "qk_norm": _OFF,
    "query_pre_attn_scalar": _OFF,
    "residual_multiplier": _ONE,
    "rope_traditional": _OFF,
    "scale_depth": _ONE,
    "scale_emb": _ONE,
    "use_mrope": _OFF,
    "use_parallel_residual": _OFF,
    "use_qk_norm": _OFF,
}


class Fields:
    """``config.json`` as an object whose every read is checked; errors name field and value."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.model_type = raw.get("model_type")

    def refuse_unbuilt(self) -> None:
        """Raises ConfigError for a field whose value changes the computation in a way not built."""
        for name, neutral in _NEUTRAL.items():
            value = self.raw.get(name)
            # 1 == True: a switch that is on is not the factor 1.
            if value is True or value not in neutral:
                raise ConfigError(
                    f"config.json sets {name} to {value!r}, which {self.model_type} models here do "
                    "not compute; take another checkpoint."
                )
        if no_rope := self.raw.get("no_rope_layers"):
            raise ConfigError(
                f"config.json sets no_rope_layers to {no_rope!r}; layers without RoPE are not "
                "built."
            )

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; ``default`` where the field is missing or null."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"config.json: {name} is {value!r}, not a positive integer.")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite positive number; ``default`` where the field is missing or null."""
        value = self._get(name, default)
        return positive(value, name)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {name} is {value!r}, not true or false.")
        return value

    def sequence(self, name: str) -> list[Any]:
        """A list; empty where the field is missing or null."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, list):
            raise ConfigError(f"config.json: {name} is {value!r}, not a list.")
        return value or []

    def _get(self, name: str, default: object) -> Any:
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(f"config.json has no {name}, which {self.model_type} models need.")
        return default


def positive(value: object, name: str) -> float:
    """``value`` as a float. Raises ConfigError unless it is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ConfigError(f"config.json: {name} is {value!r}, not a positive number.")
    return float(value)
