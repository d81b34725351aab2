"""Rotary position embeddings (RoFormer, arXiv:2104.09864), half-split, with their long-context
variants: linear, dynamic NTK, Llama 3's and YaRN (arXiv:2309.00071).

A head's element i and i + head_dim/2 form a pair that position p turns by p * inverse_frequency[i].
Angles are worked out in f64 on the CPU, once a pass and not once a layer: every device and every
pipeline stage then sees the same f32 cosines and sines.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .fields import positive

logger = logging.getLogger(__name__)

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")

_NUMBERS = (
    "factor", "rope_theta", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
)  # fmt: skip
_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}  # fmt: skip
_MAY_BE_ZERO = ("mscale", "mscale_all_dim")  # which means that they are not there
# "finetuned" is a remark in early YaRN configs; partial_rotary_factor is looked at before.
_KNOWN = {*_NUMBERS, "type", "rope_type", "truncate", "finetuned", "partial_rotary_factor"}


@dataclass(frozen=True)
class RopeConfig:
    """Parameters of RoPE. Those that ``rope_type`` does not use keep their defaults."""

    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    @classmethod
    def from_raw(
        cls,
        raw: Mapping[str, Any],
        *,
        head_dim: int,
        max_position_embeddings: int,
        default_theta: float,
    ) -> RopeConfig:
        """Reads ``rope_parameters`` (transformers 5), else ``rope_scaling`` and ``rope_theta``.

        Raises ConfigError for a type that is not built, for settings that are unknown (they may
        change the computation) and for missing ones.
        """
        entry = _rope_entry(raw)
        rope_type = _rope_type(entry)
        if (partial := entry.get("partial_rotary_factor")) not in (None, 1):
            raise ConfigError(
                f"config.json: partial_rotary_factor {partial!r} is not built; whole heads are "
                "rotated."
            )
        if unknown := sorted(set(entry) - _KNOWN):
            raise ConfigError(
                f"config.json: rope type {rope_type!r} has the setting {unknown[0]!r}, which is "
                "not built."
            )
        if head_dim % 2 or (rope_type == "dynamic" and head_dim == 2):
            raise ConfigError(f"config.json: head_dim is {head_dim}, but RoPE needs an even one.")
        settings: dict[str, Any] = {
            name: positive(entry[name], f"rope setting {name}")
            for name in _NUMBERS
            if entry.get(name) is not None and not (name in _MAY_BE_ZERO and entry[name] == 0)
        }
        settings.setdefault("rope_theta", _theta(raw, default_theta))
        if settings["rope_theta"] <= 1:
            raise ConfigError(
                f"config.json: rope_theta is {settings['rope_theta']:g}, but must be above 1."
            )
        outer = raw.get("original_max_position_embeddings")
        if outer is not None:
            settings.setdefault(
                "original_max_position_embeddings",
                positive(outer, "original_max_position_embeddings"),
            )
        if (truncate := entry.get("truncate")) is not None:
            settings["truncate"] = bool(truncate)
        for name in _NEEDS[rope_type]:
            if name not in settings:
                raise ConfigError(f"config.json: rope type {rope_type!r} needs the setting {name}.")
        rope = cls(head_dim, max_position_embeddings, rope_type=rope_type, **settings)
        if rope_type == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
            raise ConfigError(
                f"config.json: high_freq_factor {rope.high_freq_factor:g} must be above "
                f"low_freq_factor {rope.low_freq_factor:g}."
            )
        return rope

    @property
    def scaling(self) -> float:
        """Factor on cosines and sines: YaRN's attention temperature, 1 for all other types."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    def depends_on(self, length: int) -> bool:
        """Whether rows of a text of so many positions are others than those of a short one."""
        return self.rope_type == "dynamic" and length > self.max_position_embeddings

    def inverse_frequencies(self, length: int) -> Tensor:
        """[head_dim / 2] f64: by how much each pair turns from one position to the next.

        ``length`` is the number of positions of the whole text, which only dynamic RoPE looks at.
        """
        base = self.rope_theta
        if self.rope_type == "dynamic":
            longest = self.max_position_embeddings
            stretch = self.factor * max(length, longest) / longest - (self.factor - 1)
            base *= stretch ** (self.head_dim / (self.head_dim - 2))
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        inverse = base**-exponents
        if self.rope_type == "linear":
            return inverse / self.factor
        if self.rope_type == "llama3":
            return self._llama3(inverse)
        if self.rope_type == "yarn":
            return self._yarn(inverse)
        return inverse

    def rows(self, start: int, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [count, head_dim] in f32 of positions start .. start + count.

        Signed: negative in the first half, so that turning x is
        ``x * cos + x.roll(head_dim / 2) * sin``.
        """
        positions = torch.arange(start, start + count, dtype=torch.float64)
        angles = torch.outer(positions, self.inverse_frequencies(length))
        cos, sin = angles.cos() * self.scaling, angles.sin() * self.scaling
        return torch.cat((cos, cos), 1).float(), torch.cat((-sin, sin), 1).float()

    def _llama3(self, inverse: Tensor) -> Tensor:
        """Long wavelengths are stretched by ``factor``, short ones kept, those between blended."""
        original, low, high = (
            self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor,
        )  # fmt: skip
        turns = original * inverse / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return inverse * ((1 - blend) / self.factor + blend)

    def _yarn(self, inverse: Tensor) -> Tensor:
        """As llama3, but the blend is linear in the pair's index between two numbers of turns."""
        low, high = self._yarn_index(self.beta_fast), self._yarn_index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        if low == high:
            high += 0.001
        index = torch.arange(self.head_dim // 2, dtype=torch.float64)
        stretched = ((index - low) / (high - low)).clamp(0, 1)
        return inverse * (stretched / self.factor + (1 - stretched))

    def _yarn_index(self, turns: float) -> float:
        """The (fractional) pair that turns so often within the original context."""
        ratio = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return self.head_dim * math.log(ratio) / (2 * math.log(self.rope_theta))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs of x [..., L, heads, head_dim] by rows [L, 1, head_dim] of ``RopeConfig``."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _theta(raw: Mapping[str, Any], default: float) -> float:
    theta = raw.get("rope_theta")
    return default if theta is None else positive(theta, "rope_theta")


def _rope_entry(raw: Mapping[str, Any]) -> dict[str, Any]:
    parameters, scaling = raw.get("rope_parameters"), raw.get("rope_scaling")
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"config.json: {name} is {value!r}, not an object.")
    if not parameters:
        return dict(scaling or {})
    # transformers 5 may write one entry for each kind of layer.
    nested = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    if nested:
        entries = list(nested.values())
        if len(nested) != len(parameters) or any(entry != entries[0] for entry in entries):
            raise ConfigError(
                "config.json: rope_parameters differ between kinds of layers "
                f"({', '.join(sorted(parameters))}), which is not built."
            )
        parameters = entries[0]
    if scaling and _without_type(scaling) != _without_type(parameters):
        logger.warning("config.json has rope_parameters and rope_scaling; rope_scaling is ignored")
    return dict(parameters)


def _without_type(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": _rope_type(entry)} | {
        key: value for key, value in entry.items() if key not in ("type", "rope_type", "rope_theta")
    }


def _rope_type(entry: Mapping[str, Any]) -> str:
    names = [entry[key] for key in ("rope_type", "type") if entry.get(key) is not None]
    if len(names) == 2 and names[0] != names[1]:
        raise ConfigError(f"config.json: rope has two types, {names[0]!r} and {names[1]!r}.")
    rope_type = names[0] if names else "default"
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"config.json: rope type {rope_type!r} is not built; {', '.join(ROPE_TYPES)} are."
        )
    return str(rope_type)
