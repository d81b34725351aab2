"""Llama (arXiv:2302.13971, 2307.09288, 2407.21783): Llama 2 and 3, SmolLM2, Yi, R1 distilled to
Llama, and what else calls itself ``llama``. Each block does

h = h + W_o attention(RoPE(W_q x), RoPE(W_k x), W_v x),  x = norm(h)
h = h + W_down(silu(W_gate x) * W_up x),                 x = norm(h)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import CausalLM, RMSNorm, Step
from .config import DecoderConfig, common_fields, narrowest_window
from .fields import Fields


@dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """``attention_bias``: q, k, v and o have biases. ``mlp_bias``: all three MLP matrices do."""

    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_fields(cls, fields: Fields, tied: bool) -> LlamaConfig:
        """Reads ``config.json``. Raises ConfigError for what is missing, wrong or not built."""
        return cls(
            **common_fields(fields, default_theta=10000.0, default_context=2048),
            tied=tied,
            sliding_window=narrowest_window(
                fields.sequence("layer_types"), fields.raw.get("sliding_window")
            ),
            attention_bias=fields.flag("attention_bias"),
            mlp_bias=fields.flag("mlp_bias"),
        )


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.attention_bias
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.layer = layer
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(size, heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, kv_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * config.head_dim, size, bias=bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        heads = (*x.shape[:-1], -1, self.head_dim)
        queries = step.rotate(self.q_proj(x).view(heads))
        keys = step.rotate(self.k_proj(x).view(heads))
        values = self.v_proj(x).view(heads)
        return self.o_proj(step.attend(self.layer, queries, keys, values).to(x.dtype))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, h: Tensor, step: Step) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), step)
        return h + self.mlp(self.post_attention_layernorm(h))


class Llama(CausalLM):
    """``config.json``: ``"model_type": "llama"``."""

    config: LlamaConfig
    config_class = LlamaConfig
    block = Block
