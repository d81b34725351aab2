"""``config.json`` and ``generation_config.json``: what a checkpoint says about itself, read once.

This file knows how MLX writes quantization into the config, and refuses what is not built. Which
bytes there really are is the business of ``checkpoint.py``: where both disagree, it decides.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError

logger = logging.getLogger(__name__)

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
LANGUAGE_MODEL = "language_model."
"""Prefix under which checkpoints derived from vision models keep their text model."""

_UNBUILT_MODES = ("mxfp4", "nvfp4", "mxfp8")
_MAX_JSON_BYTES = 64 << 20  # the longest real config.json is a few hundred kB
_NO_LIMIT = 1e9  # finite, because JSON lets infinity and integers beyond any float through


@dataclass(frozen=True)
class QuantParams:
    """How one matrix is packed: ``bits`` a weight, ``group_size`` weights a scale, ``mode``."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __str__(self) -> str:
        return f"{self.bits} bits, group size {self.group_size}"


@dataclass(frozen=True)
class Quantization:
    """The config's ``quantization`` entry.

    ``default`` holds for modules without an entry of their own; ``overrides`` maps a module path
    to its parameters, or to None where the config says ``false`` (left dense).
    """

    default: QuantParams | None
    overrides: Mapping[str, QuantParams | None] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling defaults of ``generation_config.json``; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """What is needed before any weight is read.

    ``raw`` is ``config.json`` with a nested ``text_config`` merged over the top level, so that a
    family finds its fields in one place. ``eos_token_ids`` is the union of both config files.
    """

    raw: dict[str, Any]
    model_type: str
    quantization: Quantization | None
    eos_token_ids: tuple[int, ...]
    generation: GenerationDefaults


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ConfigError, naming the file, if there is none."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise ConfigError(f"{path} has {size} bytes, which is too long for a config file.")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a model directory has one.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is damaged: {error.msg} in line {error.lineno}, column {error.colno}."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is damaged: it is not UTF-8 text.") from None
    except RecursionError:
        raise ConfigError(f"{path} is damaged: its values are nested too deeply.") from None
    except ConfigError:
        raise
    except ValueError as error:  # a number with thousands of digits
        raise ConfigError(f"{path} is damaged: {error}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {_json_type(value)} where an object was expected.")
    return value


def read_checkpoint_config(directory: str | Path) -> CheckpointConfig:
    """Reads ``config.json`` and, where it exists, ``generation_config.json`` of a model directory.

    Raises ConfigError for a missing or damaged file, for code that the checkpoint wants to run
    (``model_file``) and for quantization that is not MLX's affine one.
    """
    path = Path(directory) / "config.json"
    top = read_json(path)
    raw = _merge_text_config(top, path)
    if (model_file := raw.get("model_file")) is not None:
        raise ConfigError(
            f"{path} wants its own code to be run (model_file {model_file!r}); "
            "torch_q4metal runs no code from a checkpoint."
        )
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ConfigError(f"{path} has no model_type, so nobody can tell which model this is.")

    generation_path = path.with_name("generation_config.json")
    generation = read_json(generation_path) if generation_path.exists() else {}
    eos = (
        *_token_ids(generation, generation_path),
        *_token_ids(top, path),
        *_token_ids(raw, path),
    )
    return CheckpointConfig(
        raw=raw,
        model_type=model_type,
        quantization=_quantization(raw, path),
        eos_token_ids=tuple(dict.fromkeys(eos)),
        generation=_generation_defaults(generation, generation_path),
    )


def _merge_text_config(top: dict[str, Any], path: Path) -> dict[str, Any]:
    text = top.get("text_config")
    if text is None:
        return top
    if not isinstance(text, dict):
        raise ConfigError(f"{path}: text_config is a {_json_type(text)}, not an object.")
    merged = {key: value for key, value in top.items() if key != "text_config"}
    merged.update(text)
    # Converters write the entry on either level; the outer one is MLX's own.
    for key in ("quantization", "quantization_config"):
        if top.get(key) is not None:
            merged[key] = top[key]
    return merged


def _quantization(raw: dict[str, Any], path: Path) -> Quantization | None:
    """MLX's ``quantization`` wins, as in mlx-lm; its copy ``quantization_config`` has no method."""
    key = "quantization"
    if raw.get(key) is None:
        key = "quantization_config"
    entry = raw.get(key)
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise ConfigError(f"{path}: {key} is a {_json_type(entry)}, not an object.")
    method = entry.get("quant_method")
    if key == "quantization_config" and method is not None:
        raise ConfigError(
            f"{path}: weights quantized with {method!r} are not supported; take a checkpoint in "
            "the MLX format or convert the unquantized one with python -m torch_q4metal.convert."
        )
    default = None
    if "bits" in entry or "group_size" in entry:
        default = _quant_params(entry, f"{path}: {key}")
    overrides: dict[str, QuantParams | None] = {}
    for name, value in entry.items():
        module = name.removeprefix(LANGUAGE_MODEL)
        if value is False:
            overrides[module] = None
        elif isinstance(value, dict):
            overrides[module] = _quant_params(value, f"{path}: {key} of {name!r}")
        elif value is True:
            continue  # "quantized like the rest": the shapes say how
        elif name not in ("bits", "group_size", "mode", "quant_method"):
            logger.warning("%s: %s has an unknown setting %r, ignored", path, key, name)
    return Quantization(default, overrides)


def _quant_params(entry: Mapping[str, Any], where: str) -> QuantParams:
    """Missing fields are MLX's defaults: affine, group size 64, 4 bits."""
    mode = entry.get("mode", "affine")
    if mode in _UNBUILT_MODES:
        raise ConfigError(f"{where}: mode {mode!r} is not built yet; only 'affine' is.")
    if mode != "affine":
        raise ConfigError(f"{where}: unknown mode {mode!r}; 'affine' is what this version reads.")
    bits, group_size = entry.get("bits", 4), entry.get("group_size", 64)
    if not _is_int(bits) or bits not in AFFINE_BITS:
        raise ConfigError(f"{where}: bits is {bits!r}, but must be one of {_listed(AFFINE_BITS)}.")
    if not _is_int(group_size) or group_size not in GROUP_SIZES:
        raise ConfigError(
            f"{where}: group_size is {group_size!r}, but must be one of {_listed(GROUP_SIZES)}."
        )
    return QuantParams(bits, group_size)


def _token_ids(config: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_is_int(i) and i >= 0 for i in ids):
        raise ConfigError(f"{path}: eos_token_id is {value!r}, not a token id or a list of them.")
    return tuple(ids)


def _generation_defaults(config: Mapping[str, Any], path: Path) -> GenerationDefaults:
    temperature = _number(config, "temperature", path, low=0.0)
    if config.get("do_sample") is False:
        temperature = 0.0
    top_k = _number(config, "top_k", path, low=0.0)
    return GenerationDefaults(
        temperature=temperature,
        top_p=_number(config, "top_p", path, low=0.0, high=1.0),
        top_k=None if top_k is None else int(top_k),
        min_p=_number(config, "min_p", path, low=0.0, high=1.0),
        repetition_penalty=_number(config, "repetition_penalty", path, low=0.0),
    )


def _number(
    config: Mapping[str, Any], key: str, path: Path, low: float, high: float = _NO_LIMIT
) -> float | None:
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{path}: {key} is {value!r}, not a number from {low:g} to {high:g}.")
    return float(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _json_type(value: object) -> str:
    names = {list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
