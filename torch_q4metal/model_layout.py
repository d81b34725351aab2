"""Which tensors a Llama or Qwen2 checkpoint has, in MLX's order and under MLX's names.

Both converters walk this list: what a source lacks is an error that names it, and what a source has
beyond it is one too.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSizes:
    """What decides names and shapes of a Llama or Qwen2 checkpoint. ``tied``: no ``lm_head``."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool


@dataclass(frozen=True)
class ModuleSpec:
    """One module with parameters: ``shape`` is that of its weight, [N, K] or, for a norm, [K]."""

    path: str
    shape: tuple[int, ...]
    bias: bool = False

    @property
    def is_matrix(self) -> bool:
        """A Linear or an Embedding: what quantization may touch."""
        return len(self.shape) == 2


def model_modules(sizes: ModelSizes) -> Iterator[ModuleSpec]:
    """The modules in the order in which mlx-lm saves them (``down_proj`` before ``up_proj``)."""
    hidden, intermediate = sizes.hidden, sizes.intermediate
    q_rows, kv_rows = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    yield ModuleSpec("model.embed_tokens", (sizes.vocab, hidden))
    for layer in range(sizes.layers):
        at = f"model.layers.{layer}"
        yield ModuleSpec(f"{at}.self_attn.q_proj", (q_rows, hidden), sizes.qkv_bias)
        yield ModuleSpec(f"{at}.self_attn.k_proj", (kv_rows, hidden), sizes.qkv_bias)
        yield ModuleSpec(f"{at}.self_attn.v_proj", (kv_rows, hidden), sizes.qkv_bias)
        yield ModuleSpec(f"{at}.self_attn.o_proj", (hidden, q_rows), sizes.output_bias)
        yield ModuleSpec(f"{at}.mlp.gate_proj", (intermediate, hidden), sizes.mlp_bias)
        yield ModuleSpec(f"{at}.mlp.down_proj", (hidden, intermediate), sizes.mlp_bias)
        yield ModuleSpec(f"{at}.mlp.up_proj", (intermediate, hidden), sizes.mlp_bias)
        yield ModuleSpec(f"{at}.input_layernorm", (hidden,))
        yield ModuleSpec(f"{at}.post_attention_layernorm", (hidden,))
    yield ModuleSpec("model.norm", (hidden,))
    if not sizes.tied:
        yield ModuleSpec("lm_head", (sizes.vocab, hidden))
