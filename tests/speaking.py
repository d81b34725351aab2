"""A tiny checkpoint that says what it is told to: each token is followed by a fixed other one.

    path = write_speaking(tmp_path / "model", "Paris.")          # every answer is "Paris."
    path = write_speaking(tmp_path / "model", "0123", endless=True)  # 0123012301...

Attention and MLP give zero, so that the head sees the embedding of the newest token only, and the
head's row of a token is the embedding of the token before it. Bytes of the text must differ.
"""

from pathlib import Path
from typing import Any

import torch
from tiny import EOS_ID, write_shards, write_tiny

from torch_q4metal import reference

FIRST = ord("\n")  # what the chat template ends with


def write_speaking(
    path: Path, text: str, *, endless: bool = False, layers: int = 1, **options: Any
) -> Path:
    """Write the model's directory and return it. ``options`` are those of ``write_tiny``."""
    codes = list(text.encode())
    assert len({FIRST, *codes}) == len(codes) + 1, "a token can have one successor only"
    fields = {"max_position_embeddings": 1 << 16} | options.pop("config", {})
    model = write_tiny(path, tied=False, layers=layers, config=fields, **options)
    embedding = torch.randn(model.dense["lm_head.weight"].shape)
    head = torch.zeros_like(embedding)
    for before, after in zip([FIRST, *codes], [*codes, EOS_ID], strict=True):
        head[after] = embedding[before]
    if endless:
        head[EOS_ID] = 0
        head[codes[0]] += embedding[codes[-1]]
    tensors = dict(model.tensors)
    weights = {"model.embed_tokens": embedding, "lm_head": head}
    for layer in range(layers):
        weights[f"model.layers.{layer}.self_attn.o_proj"] = torch.zeros(64, 64)
        weights[f"model.layers.{layer}.mlp.down_proj"] = torch.zeros(64, 96)
    for module, weight in weights.items():
        packed = reference.quantize(weight, group_size=32, bits=4)
        tensors |= zip((f"{module}.{part}" for part in ("weight", "scales", "biases")), packed)
    tensors["model.norm.weight"] = torch.ones(64)
    write_shards(path, tensors)
    return path
