"""A model of a given shape with random weights, on a device: for measuring speed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .linear import Q4Embedding, Q4Linear
from .memory import check_memory
from .model_shapes import ModelShape
from .models.base import CausalLM, RMSNorm
from .models.fields import Fields
from .models.loading import FAMILIES

_BLOCK_WORDS = 1 << 22


def random_model(shape: ModelShape, device: torch.device, context: int) -> CausalLM:
    """The model, packed as ``shape`` says with scales in bfloat16; ``context`` positions at most.

    Raises MemoryLimitError where it would not fit.
    """
    family = FAMILIES[shape.family]
    config = family.config_class.from_fields(Fields(_config(shape, context)), shape.tied)
    check_memory(config, shape.file_bytes, torch.bfloat16, context, device=device)
    with torch.device("meta"):
        model = family(config, torch.float32, torch.bfloat16, context)
    for name, module in list(model.named_modules()):
        parent_name, _, own_name = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if isinstance(module, nn.Linear | nn.Embedding):
            setattr(parent, own_name, _packed(name, module, shape, device))
        elif isinstance(module, RMSNorm):
            module.weight = nn.Parameter(torch.ones(module.weight.shape, device=device))
    return model.eval().requires_grad_(False)


def _packed(
    name: str, module: nn.Linear | nn.Embedding, shape: ModelShape, device: torch.device
) -> nn.Module:
    rows, columns = module.weight.shape
    is_end = isinstance(module, nn.Embedding) or name == "lm_head"
    bits, group_size = shape.head_bits if is_end else shape.bits, shape.group_size
    packed = random_matrix(rows, columns, bits, group_size, device)
    if isinstance(module, nn.Embedding):
        return Q4Embedding.from_tensors(
            *packed, group_size=group_size, bits=bits, dtype=torch.float32
        )
    bias = None if module.bias is None else torch.zeros(rows, device=device)
    return Q4Linear.from_tensors(*packed, bias, group_size=group_size, bits=bits)


def _config(shape: ModelShape, context: int) -> dict[str, Any]:
    return {
        "model_type": shape.family,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    }


def random_matrix(
    rows: int, columns: int, bits: int, group_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """weight, scales and biases of a matrix [rows, columns] whose products stay about as large as
    what is multiplied.
    """
    words, groups = columns * bits // 32, columns // group_size
    weight = random_words(rows * words, device).view(rows, words)
    levels = (1 << bits) - 1
    scale = 3.4 / levels / columns**0.5
    scales = torch.full((rows, groups), scale, dtype=torch.bfloat16, device=device)
    return weight, scales, scales * (-levels / 2)


def random_words(count: int, device: torch.device) -> Tensor:
    """int32 [count] of random bits, the same every 16 MB: made on the CPU, for which a seed stands
    for the same numbers everywhere.
    """
    generator = torch.Generator().manual_seed(0)
    size = min(count, _BLOCK_WORDS)
    block = torch.randint(-(1 << 31), (1 << 31) - 1, (size,), generator=generator).int()
    words = torch.empty(count, dtype=torch.int32, device=device)
    for begin in range(0, count, _BLOCK_WORDS):
        part = words[begin : begin + _BLOCK_WORDS]
        part.copy_(block[: len(part)])
    return words
