"""From a checkpoint directory to a model that is ready to run."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..device import resolve_device
from ..errors import ConfigError, Q4MetalError
from ..linear import Q4Embedding
from ..memory import check_memory
from ..packed import load_packed
from .base import DEFAULT_CONTEXT, CausalLM
from .config import DecoderConfig
from .dense import compute_dense_in_f32
from .fields import Fields
from .llama import Llama
from .part import Part
from .qwen2 import Qwen2

logger = logging.getLogger(__name__)

FAMILIES: dict[str, type[CausalLM]] = {"llama": Llama, "qwen2": Qwen2}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_model(
    path: str | Path | Checkpoint,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
    *,
    max_kv_size: int | None = None,
    force: bool = False,
    layers: range | None = None,
) -> CausalLM:
    """The model in a directory, in eval mode and without gradients; its weights stay packed.

    ``path``         the directory, or a checkpoint that is open already
    ``dtype``        of activations, None is f32; on MPS only while prompts are read, tokens are
                     decoded in f32
    ``device``       "cpu", which None means too; "mps"; "auto": mps where it is available
    ``precision``    "fast", "exact" or "int8"; None is exact for ``dtype`` f32, else fast
    ``max_kv_size``  longest text, prompt and answer together; None is the smaller of 8192 and what
                     the model was trained for
    ``force``        loads it even if memory seems too small
    ``layers``       only these, for a pipeline stage: no other tensor's bytes are touched

    On MPS the weights are read once, to there; on the CPU they stay in the mapped files or, on
    Linux with memory enough, are read into huge pages. Raises ConfigError and CheckpointError for
    what is wrong with the directory, MemoryLimitError if it would not fit, Q4MetalError for a
    device that is not available.
    """
    place = resolve_device(device)
    precision = resolve_precision(dtype, precision)
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    family, config = read_family(checkpoint)
    context = resolve_context(config, max_kv_size)
    kv_dtype = torch.float32 if precision == "exact" else checkpoint.scales_dtype
    total = config.num_hidden_layers
    part = Part(range(total) if layers is None else layers, total, config.tied)
    if not part.is_whole:
        checkpoint = checkpoint.only(part.owns)
    check_memory(
        config, checkpoint.weight_bytes, kv_dtype, context,
        layers=len(part.layers), force=force, device=place,
    )  # fmt: skip

    with torch.device("meta"):
        model = family(config, dtype or torch.float32, kv_dtype, context, part)
    load_packed(model, checkpoint, precision=precision, device=place)
    compute_dense_in_f32(model)
    model.checkpoint = checkpoint
    embedding = model.model.embed_tokens
    if isinstance(embedding, Q4Embedding):
        embedding.dtype = torch.float32  # rows begin the residual stream
    return model.eval().requires_grad_(False)


def read_family(checkpoint: Checkpoint) -> tuple[type[CausalLM], DecoderConfig]:
    """The family of a checkpoint and its config. Raises ConfigError for one that is not built.

    Whether the head is tied is decided by the files: ``tie_word_embeddings`` is often missing, and
    its default differs between mlx-lm and transformers.
    """
    raw, model_type = checkpoint.config.raw, checkpoint.config.model_type
    family = FAMILIES.get(model_type)
    if family is None:
        raise ConfigError(
            f"config.json: model_type {model_type!r} is not built; {', '.join(FAMILIES)} are."
        )
    fields = Fields(raw)
    tied = not checkpoint.has("lm_head.weight")
    said = fields.flag("tie_word_embeddings", tied)
    if said and not tied:
        logger.warning("config.json says that the head is tied, but lm_head.weight is there: used")
    if tied and not said:
        checkpoint.info("lm_head.weight")  # raises: a shard is missing, say
    return family, family.config_class.from_fields(fields, tied)


def resolve_precision(dtype: torch.dtype | None, precision: str | None) -> str:
    """What ``load_model`` takes for these two. Raises Q4MetalError for what is none."""
    if dtype is not None and dtype not in _DTYPES:
        raise Q4MetalError(f"dtype is {dtype}, but activations are float32, bfloat16 or float16.")
    if precision is None:
        precision = "exact" if dtype == torch.float32 else "fast"
    if precision not in ("exact", "fast", "int8"):
        raise Q4MetalError(f"precision is {precision!r}, but must be 'fast', 'exact' or 'int8'.")
    return precision


def resolve_context(config: DecoderConfig, max_kv_size: int | None) -> int:
    """What ``load_model`` takes for ``max_kv_size``. Raises Q4MetalError for what cannot be."""
    trained = config.max_position_embeddings
    if max_kv_size is None:
        context = min(trained, DEFAULT_CONTEXT)
    elif max_kv_size < 1:
        raise Q4MetalError(f"max_kv_size is {max_kv_size}, but must be at least 1.")
    else:
        context = max_kv_size
        if context > trained and config.rope.rope_type != "dynamic":
            logger.warning(
                "max_kv_size %d is beyond the %d tokens that the model was trained for",
                context, trained,
            )  # fmt: skip
    if config.sliding_window is not None and context > config.sliding_window:
        raise ConfigError(
            f"config.json: layers see only the last {config.sliding_window} tokens "
            "(sliding_window), which is not built; load the model with max_kv_size="
            f"{config.sliding_window}, up to which that makes no difference."
        )
    return context
