"""Qwen2 (arXiv:2407.10671): Qwen2, Qwen2.5, R1 distilled to Qwen. Each block does

h = h + W_o attention(RoPE(W_q x + b_q), RoPE(W_k x + b_k), W_v x + b_v),  x = norm(h)
h = h + W_down(silu(W_gate x) * W_up x),                                   x = norm(h)
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
class Qwen2Config(DecoderConfig):
    """No fields of its own: q, k and v always have biases, nothing else ever does."""

    @classmethod
    def from_fields(cls, fields: Fields, tied: bool) -> Qwen2Config:
        """Reads ``config.json``. Raises ConfigError for what is missing, wrong or not built."""
        common = common_fields(fields, default_theta=1e6, default_context=32768)
        window = None
        # Real configs name a window and switch it off; from max_window_layers on, layers slide.
        if fields.flag("use_sliding_window"):
            full = fields.raw.get("max_window_layers", 28)
            layers = range(common["num_hidden_layers"])
            kinds = ["sliding_attention" if i >= full else "full_attention" for i in layers]
            kinds = fields.sequence("layer_types") or kinds
            window = narrowest_window(kinds, fields.raw.get("sliding_window"))
        else:
            narrowest_window(fields.sequence("layer_types"), 1)
        return cls(**common, tied=tied, sliding_window=window)


class Attention(nn.Module):
    def __init__(self, config: Qwen2Config, layer: int) -> None:
        super().__init__()
        size, head_dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.layer = layer
        self.head_dim = head_dim
        self.q_proj = nn.Linear(size, heads * head_dim, bias=True)
        self.k_proj = nn.Linear(size, kv_heads * head_dim, bias=True)
        self.v_proj = nn.Linear(size, kv_heads * head_dim, bias=True)
        self.o_proj = nn.Linear(heads * head_dim, size, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        heads = (*x.shape[:-1], -1, self.head_dim)
        queries = step.rotate(self.q_proj(x).view(heads))
        keys = step.rotate(self.k_proj(x).view(heads))
        values = self.v_proj(x).view(heads)
        return self.o_proj(step.attend(self.layer, queries, keys, values).to(x.dtype))


class MLP(nn.Module):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Qwen2Config, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, h: Tensor, step: Step) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), step)
        return h + self.mlp(self.post_attention_layernorm(h))


class Qwen2(CausalLM):
    """``config.json``: ``"model_type": "qwen2"``."""

    config: Qwen2Config
    config_class = Qwen2Config
    block = Block
