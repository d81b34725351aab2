"""The model families, one a file, named as in ``config.json``'s ``model_type``."""

from .base import CausalLM, Step
from .config import DecoderConfig
from .loading import FAMILIES, load_model

__all__ = ["FAMILIES", "CausalLM", "DecoderConfig", "Step", "load_model"]
