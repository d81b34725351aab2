"""What the kernels of a model depend on: how its matrices are stored, its heads, its dtypes."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from .linear import Q4Embedding, Q4Linear
from .models.base import CausalLM


@dataclass(frozen=True)
class Format:
    """How a matrix is stored: packed with the dtype of its scales, or dense with its own."""

    bits: int  # 0: dense
    group_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, module: nn.Module) -> Format:
        """The format of a linear layer's or an embedding's matrix."""
        if isinstance(module, Q4Linear | Q4Embedding):
            dtype = torch.promote_types(module.scales.dtype, module.biases.dtype)
            return cls(module.bits, module.group_size, dtype)
        assert isinstance(module.weight, Tensor)
        return cls(0, 0, module.weight.dtype)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        if self.bits == 0:
            return f"dense {dtype}"
        return f"{self.bits} bits, group size {self.group_size}, {dtype}"


@dataclass(frozen=True)
class LayerFormats:
    """Formats of one layer's matrices."""

    q: Format
    k: Format
    v: Format
    output: Format
    gate: Format
    up: Format
    down: Format

    @classmethod
    def of(cls, block: nn.Module) -> LayerFormats:
        attention, mlp = block.self_attn, block.mlp
        modules = [getattr(attention, f"{name}_proj") for name in "qkvo"]
        modules += [getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")]
        return cls(*map(Format.of, modules))

    @classmethod
    def uniform(cls, form: Format) -> LayerFormats:
        """All matrices in one format."""
        return cls(*[form] * len(fields(cls)))


@dataclass(frozen=True)
class ModelFormats:
    """Formats of a model, or of a stage of one.

    ``layers``   each way in which a layer is stored, once
    ``table``    of the embedding, None where another stage embeds
    ``head``     None where another stage has it
    ``heads``    query heads, ``kv_heads`` those of keys and values
    ``context``  longest text
    ``dtype``    of activations while prompts are read, multiplied with ``precision``
    """

    layers: tuple[LayerFormats, ...]
    table: Format | None
    head: Format | None
    kv_dtype: torch.dtype
    head_dim: int
    heads: int
    kv_heads: int
    context: int
    dtype: torch.dtype
    precision: str

    @classmethod
    def of(cls, model: CausalLM) -> ModelFormats:
        config, part, decoder = model.config, model.part, model.model
        layers = dict.fromkeys(LayerFormats.of(block) for block in decoder.layers)
        precisions = [m.precision for m in model.modules() if isinstance(m, Q4Linear)]
        table = Format.of(decoder.embed_tokens) if part.has_table else None
        head = None
        if part.has_head:
            head = table if config.tied else Format.of(model.lm_head)
        return cls(
            layers=tuple(layers),
            table=table if part.embeds else None,
            head=head,
            kv_dtype=model.kv_dtype,
            head_dim=config.head_dim,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            context=model.max_kv_size,
            dtype=model.dtype,
            precision=precisions[0] if precisions else "fast",
        )

    @property
    def layer_products(self) -> list[Format]:
        """Packed formats of the matrices in layers that rows are multiplied by."""
        used = [form for layer in self.layers for form in vars(layer).values()]
        return [form for form in dict.fromkeys(used) if form.bits]

    @property
    def head_products(self) -> list[Format]:
        """The head's format, if it is here and packed."""
        return [] if self.head is None or self.head.bits == 0 else [self.head]
