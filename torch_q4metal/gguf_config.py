"""The metadata of a GGUF model as ``config.json`` and ``generation_config.json``.

Everything that GGUF says about the computation is either converted or refused: a key of the
architecture that is not known here is an error, never ignored.
"""

import math
from typing import Any

import numpy as np

from .errors import ConfigError
from .gguf_file import GgufFile, printable
from .model_layout import ModelSizes

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# Keys after "{architecture}." that are converted or checked below.
_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.causal",
    "attention.scale", "attention.sliding_window", "attention.clamp_kqv",
    "attention.max_alibi_bias", "expert_count", "expert_used_count",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier", "rope.scaling.alpha",
}  # fmt: skip
_HARMLESS = {"tensor_data_layout", "pooling_type", "attention.layer_norm_epsilon"}
# Values that mean "as the family does anyway"; every other one is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.alpha": (0.0,),
}


def architecture(file: GgufFile) -> str:
    """The architecture of ``file``. Raises ConfigError unless it is built."""
    name = file.get("general.architecture", str)
    if name not in FAMILIES:
        known = " and ".join(FAMILIES)
        raise ConfigError(
            f"{file.path} has the architecture {printable(name)}: converted are {known}."
        )
    return name


def model_sizes(file: GgufFile) -> ModelSizes:
    """Sizes from the metadata; biases and a tied head from which tensors are there.

    Raises ConfigError for a key that changes the computation and is not converted.
    """
    arch = architecture(file)
    _check_keys(file, arch)
    hidden = file.get(f"{arch}.embedding_length", int)
    heads = _one_number(file, f"{arch}.attention.head_count")
    kv_heads = _one_number(file, f"{arch}.attention.head_count_kv", heads)
    head_dim = file.get(f"{arch}.attention.key_length", int, hidden // max(heads, 1))
    if min(heads, kv_heads, head_dim) < 1 or heads % kv_heads or head_dim % 2:
        raise ConfigError(
            f"{file.path}: {heads} heads of {head_dim} values, {kv_heads} of them for keys, make"
            " no model."
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.get(f"{arch}.{key}", int, head_dim) != head_dim:
            raise ConfigError(
                f"{file.path}: {arch}.{key} is {file.value(f'{arch}.{key}')} and the heads have"
                f" {head_dim} values: heads of two sizes and partly rotated heads are not built."
            )
    scale = file.get(f"{arch}.attention.scale", float, 0.0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise ConfigError(f"{file.path}: {arch}.attention.scale {scale} is not built.")
    qkv_bias = "blk.0.attn_q.bias" in file.tensors
    embedding = file.tensors.get("token_embd.weight")
    return ModelSizes(
        layers=file.get(f"{arch}.block_count", int),
        hidden=hidden,
        intermediate=_one_number(file, f"{arch}.feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        # The table may have more rows than the tokenizer has tokens, and the rows decide.
        vocab=0 if embedding is None else int(embedding.shape[-1]),
        tied="output.weight" not in file.tensors,
        qkv_bias=qkv_bias or arch == "qwen2",
        output_bias=qkv_bias and arch == "llama",  # attention_bias of llama means all four
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
    )


def model_config(file: GgufFile, sizes: ModelSizes) -> dict[str, Any]:
    """``config.json`` without its quantization section."""
    arch = architecture(file)
    eos = eos_token_ids(file)
    config: dict[str, Any] = {
        "architectures": [FAMILIES[arch]],
        "model_type": arch,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": file.get(f"{arch}.context_length", int),
        "rms_norm_eps": file.get(f"{arch}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": file.get(f"{arch}.rope.freq_base", float, 10000.0),
        "tie_word_embeddings": sizes.tied,
    }
    if arch == "llama":
        config["head_dim"] = sizes.head_dim
        config |= {"attention_bias": sizes.qkv_bias, "mlp_bias": sizes.mlp_bias}
    else:
        config["use_sliding_window"] = False
        if sizes.head_dim * sizes.heads != sizes.hidden or sizes.mlp_bias:
            raise ConfigError(
                f"{file.path}: qwen2 with its own head size or MLP biases is not built."
            )
    scaling = _rope_scaling(file, arch, sizes.head_dim, config["rope_theta"])
    if scaling is not None:
        config["rope_scaling"] = scaling
    bos = file.find("tokenizer.ggml.bos_token_id", int)
    if bos is not None:
        config["bos_token_id"] = bos
    if eos:
        config["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    return config


def generation_config(file: GgufFile) -> dict[str, Any]:
    """``generation_config.json``: the special tokens, and sampling defaults where GGUF has them."""
    config: dict[str, Any] = {}
    for key, name in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        token = file.find(f"tokenizer.ggml.{key}_token_id", int)
        if token is not None:
            config[name] = token
    eos = eos_token_ids(file)
    if eos:
        config["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    sampling = {
        "temp": "temperature",
        "top_k": "top_k",
        "top_p": "top_p",
        "min_p": "min_p",
        "penalty_repeat": "repetition_penalty",
    }
    found = {
        name: file.get(f"general.sampling.{key}", int if key == "top_k" else float)
        for key, name in sampling.items()
        if f"general.sampling.{key}" in file
    }
    return config | ({"do_sample": True} | found if found else {})


def eos_token_ids(file: GgufFile) -> list[int]:
    """The ids that end an answer: end of sequence first, then end of turn and end of message.

    GGUF often names only one of them, so control tokens with the well-known texts count too, as
    they do in llama.cpp.
    """
    ids = [file.find(f"tokenizer.ggml.{key}_token_id", int) for key in ("eos", "eot", "eom")]
    texts = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>"}
    tokens, types = (
        file.value("tokenizer.ggml.tokens") or [],
        file.value("tokenizer.ggml.token_type") or [],
    )
    control = [
        index
        for index, (text, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == 3 and text in texts
    ]
    return list(dict.fromkeys([token for token in ids if token is not None] + control))


def _check_keys(file: GgufFile, arch: str) -> None:
    for key in file:
        short = key.removeprefix(f"{arch}.")
        if short == key or short in _HARMLESS:
            continue
        if short not in _READ:
            raise ConfigError(
                f"{file.path}: {printable(key)} = {printable(file.value(key))} is not built."
            )
        value = file.value(key)
        if short in _NEUTRAL and value not in _NEUTRAL[short]:
            raise ConfigError(f"{file.path}: {key} = {printable(value)} is not built.")


def _one_number(file: GgufFile, key: str, default: int | None = None) -> int:
    """A number that GGUF may also give once per layer, provided that all layers agree."""
    value = file.value(key)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise ConfigError(
                f"{file.path}: {key} differs from layer to layer, which is not built."
            )
        return int(value[0])
    return file.get(key, int, default)


def _rope_scaling(file: GgufFile, arch: str, head_dim: int, theta: float) -> dict[str, Any] | None:
    """``rope_scaling`` for config.json. Raises ConfigError where no such entry means the same."""
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    old_factor = file.get(f"{arch}.rope.scale_linear", float, 1.0)
    factor = file.get(f"{arch}.rope.scaling.factor", float, old_factor)
    original = file.find(f"{arch}.rope.scaling.original_context_length", int)
    if f"{arch}.rope.scaling.type" not in file and old_factor != 1.0:
        kind = "linear"
    table = file.tensors.get("rope_freqs.weight")
    if table is not None:
        factors = np.asarray(table.data, dtype=np.float32)
        if not np.all(factors == 1.0):
            if kind != "none":
                raise ConfigError(
                    f"{file.path}: {printable(kind)} rope with rope_freqs.weight is not built."
                )
            return _llama3_scaling(file, factors, head_dim, theta, original)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaling: dict[str, Any] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original or file.get(f"{arch}.context_length", int),
        }
        for name in ("beta_fast", "beta_slow"):
            beta = file.find(f"{arch}.rope.scaling.yarn_{name}", float)
            if beta is not None:
                scaling[name] = beta
        return scaling
    raise ConfigError(f"{file.path}: rope scaling {printable(kind)} is not built.")


def _llama3_scaling(
    file: GgufFile, factors: np.ndarray, head_dim: int, theta: float, original: int | None
) -> dict[str, Any]:
    """The llama3 parameters that give the frequency factors of ``rope_freqs.weight``.

    GGUF keeps the factors and not the parameters; every published Llama 3 uses these bounds. Taken
    only if they give the whole table again.
    """
    largest = float(factors.max())
    for length in dict.fromkeys([original or 8192, 8192]):
        scaling = {
            "rope_type": "llama3",
            "factor": float(str(np.float32(largest))),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": length,
        }
        expected = _llama3_factors(head_dim, theta, largest, length)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-5, atol=0):
            return scaling
    raise ConfigError(
        f"{file.path}: the frequency factors of rope_freqs.weight are not those of llama3 rope with"
        f" factor {largest:g}, and a table of one's own is not built."
    )


def _llama3_factors(head_dim: int, theta: float, factor: float, original: int) -> np.ndarray:
    """What llama3 rope divides each frequency by (low_freq_factor 1, high_freq_factor 4)."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
    between = 1.0 / ((1.0 - smooth) / factor + smooth)
    result = np.where(wavelength < original / 4.0, 1.0, between)
    return np.where(wavelength > original / 1.0, factor, result).astype(np.float32)
