"""Sizes of the models that are measured: real ones, and one cut to fewer layers.

A generated model has the same weights in every format (models.py), so all engines compute the same
function and their tokens can be checked against one reference.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch_q4metal import model_shapes


@dataclass(frozen=True, kw_only=True)
class Shape(model_shapes.ModelShape):
    """A Qwen2.5 model. ``decode_tokens``: what a round decodes, fewer for the slow ones."""

    decode_tokens: int

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
            "vocab_size": self.vocabulary,
        }


def _real(name: str, title: str, decode_tokens: int) -> Shape:
    sizes = next(vars(model) for model in model_shapes.MODELS if model.name == title)
    return Shape(**sizes | {"name": name}, decode_tokens=decode_tokens)


_7B = _real("7b", "Qwen2.5-7B", 16)
# For trying the harness out: of no interest as a measurement.
_TINY = Shape("tiny", "qwen2", 256, 512, 2, 4, 2, 64, 2048, tied=True, decode_tokens=16)

SHAPES = {
    shape.name: shape
    for shape in (
        _real("0.5b", "Qwen2.5-0.5B", 128),
        _real("1.5b", "Qwen2.5-1.5B", 64),
        replace(_7B, name="7b-6", layers=6, decode_tokens=64),
        _7B,
        _TINY,
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
