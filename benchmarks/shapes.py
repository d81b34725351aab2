"""Sizes of the models that are measured: real ones, and one cut to fewer layers.

A generated model has the same weights in every format (models.py), so all engines compute the same
function and their tokens can be checked against one reference.
"""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Qwen2.5 model. ``decode_tokens``: what a round decodes, fewer for the slow ones."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    decode_tokens: int

    @property
    def parameters(self) -> int:
        """Weights of all matrices."""
        attention = self.head_dim * (2 * self.heads + 2 * self.kv_heads) * self.hidden
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocab * self.hidden * (1 if self.tied else 2)

    def config(self) -> dict[str, Any]:
        """config.json as mlx-lm writes it for a 4-bit model of this shape."""
        quantization = {"group_size": 64, "bits": 4, "mode": "affine"}
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 32768,
            "max_window_layers": self.layers,
            "model_type": "qwen2",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "quantization": quantization,
            "quantization_config": quantization,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": self.vocab,
        }


_7B = Shape("7b", 3584, 18944, 28, 28, 4, 128, 152064, tied=False, decode_tokens=16)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("0.5b", 896, 4864, 24, 14, 2, 64, 151936, tied=True, decode_tokens=128),
        Shape("1.5b", 1536, 8960, 28, 12, 2, 128, 151936, tied=True, decode_tokens=64),
        replace(_7B, name="7b-6", layers=6, decode_tokens=64),
        _7B,
        # For trying the harness out: of no interest as a measurement.
        Shape("tiny", 256, 512, 2, 4, 2, 64, 2048, tied=True, decode_tokens=16),
    )
}
SMOLLM2 = "smollm2"  # real weights: the built-in model, and the GGUF file that it comes from
MODELS = (SMOLLM2, *SHAPES)
TITLES = {
    SMOLLM2: "SmolLM2-135M",
    "0.5b": "Qwen2.5-0.5B",
    "1.5b": "Qwen2.5-1.5B",
    "7b-6": "Qwen2.5-7B, 6 layers",
    "7b": "Qwen2.5-7B",
    "tiny": "tiny",
}
