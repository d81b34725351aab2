"""Models that a decode plan is compared on, and how closely it follows the modules."""

import itertools

import tiny
import torch

from torch_q4metal import ops
from torch_q4metal.models import load_model

BY_BITS = [(bits, group_size) for bits in (2, 3, 4, 5, 6, 8) for group_size in (32, 64, 128)]
BY_GROUP_SIZE = sorted(BY_BITS, key=lambda format: format[1])
BY_NEITHER = [BY_BITS[7 * i % 18] for i in range(18)]


def every_format(formats, tied=False):
    """Overrides that give the matrices of three layers these formats in turn.

    So q, k and v of a layer have bits or group size in common, or neither.
    """
    matrices = [f"self_attn.{name}_proj" for name in "qkvo"]
    matrices += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.{matrix}" for layer in range(3) for matrix in matrices]
    names += ["model.embed_tokens"] + ([] if tied else ["lm_head"])
    return {
        name: {"bits": bits, "group_size": group_size}
        for name, (bits, group_size) in zip(names, itertools.cycle(formats))
    }


WIDE = {"hidden_size": 128, "intermediate_size": 256, "layers": 3}  # every group size divides K
DENSE_LEFTOVERS = {
    "model.layers.0.self_attn.k_proj": False,
    "model.layers.0.mlp.down_proj": False,
    "model.layers.1.self_attn.o_proj": False,
    "model.layers.1.mlp.up_proj": False,
}
MODELS = {
    "tied": {},
    "untied": {"tied": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "biases of dense matrices": {
        "attention_bias": True,
        "mlp_bias": True,
        "dtype": torch.float16,
        "overrides": DENSE_LEFTOVERS,
    },
    "qwen2": {"family": "qwen2", "tied": False},
    "every format": {**WIDE, "tied": False, "overrides": every_format(BY_NEITHER)},
    "every format, tied": {
        **WIDE,
        "dtype": torch.float16,
        "overrides": every_format(BY_BITS, tied=True),
    },
    "qwen2, every format": {
        **WIDE,
        "family": "qwen2",
        "tied": False,
        "dtype": torch.bfloat16,
        "overrides": every_format(BY_GROUP_SIZE),
    },
    "qwen2, tied, dense leftovers": {
        "family": "qwen2",
        "dtype": torch.bfloat16,
        "overrides": DENSE_LEFTOVERS,
    },
    "dense head": {"tied": False, "overrides": {"lm_head": False, "model.embed_tokens": False}},
    "dense tied table": {"dtype": torch.float16, "overrides": {"model.embed_tokens": False}},
    "odd heads": {"heads": 3, "kv_heads": 1, "head_dim": 36, "hidden_size": 96},
    "many small heads": {"heads": 8, "kv_heads": 1, "head_dim": 12, "hidden_size": 96},
    "no sharing": {"heads": 4, "kv_heads": 4, "head_dim": 24},
    "bfloat16": {"dtype": torch.bfloat16, "bits": 2, "group_size": 64, "intermediate_size": 128},
    "llama3 rope": {
        "config": {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        }
    },
}
PRECISIONS = ("exact", "fast", "int8")
# Of logits, relative to the largest. Fast and int8 round activations to 16 and 8 bits, here before
# the norm is applied and in the modules after it: now and then a value falls on the other side.
# Largest seen: 1.6e-6, 3.9e-4, 1.3e-2.
BOUND = {"exact": 1e-5, "fast": 2e-3, "int8": 5e-2}
# Of logits of a prompt. With AMX products round x to bfloat16, so the same happens with 4e-3 (both
# are then as far from exact, 2e-3 to 1e-2; from each other 3.6e-3 at most).
PROMPT_BOUND = BOUND | ({"fast": 1e-2} if ops.cpu_kernels().startswith("amx") else {})
# Of keys and values, which are also rounded to bfloat16: 4e-3 where that falls on the other side.
KV_BOUND = {"exact": 1e-5, "fast": 1e-2, "int8": 5e-2}


def load(tmp_path, precision="exact", **options):
    config = {"max_position_embeddings": 2048} | options.pop("config", {})
    path = tiny.write_tiny(tmp_path / "model", config=config, **options).path
    return load_model(path, precision=precision)


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def keys_values(sequence, begin, end):
    """[2, layers, kv_heads, end - begin, head_dim] f32 out of a sequence's blocks."""
    found = []
    for position in range(begin, end):
        slab, row = sequence.pool.locate(sequence.block_table[position // 32])
        found.append(sequence.pool.slabs[slab][:, :, row, :, position % 32].float())
    return torch.stack(found, 3)
