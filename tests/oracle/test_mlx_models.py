"""Logits and greedy text against mlx-lm, in f32: at most 1e-4 of the largest logit apart."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
import torch
from mlx.utils import tree_map
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.models import llama, qwen2
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as mlx_load_model
from mlx_lm.utils import quantize_model, save_config, save_model

from torch_q4metal.builtin_model import builtin_model
from torch_q4metal.generation import generate_step
from torch_q4metal.models import load_model
from torch_q4metal.tokenizer import Tokenizer

BOUND = 1e-4
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "tied": {},
    "untied": {"tied": False},
    "float16 scales": {"dtype": torch.float16, "tied": False},
    "bfloat16 scales": {"dtype": torch.bfloat16, "group_size": 64, "intermediate_size": 128},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one kv head": {"heads": 4, "kv_heads": 1},
    "no sharing": {"heads": 4, "kv_heads": 4, "head_dim": 24},
    "odd head_dim": {"heads": 3, "kv_heads": 1, "head_dim": 36, "hidden_size": 96},
    "dense": {"bits": None, "dtype": torch.bfloat16},
    "mixed bits": {
        "tied": False,
        "overrides": {
            "model.embed_tokens": {"bits": 8, "group_size": 32},
            "lm_head": {"bits": 6, "group_size": 64},
            "model.layers.0.self_attn.v_proj": {"bits": 6, "group_size": 32},
            "model.layers.0.mlp.down_proj": {"bits": 3, "group_size": 32},
            "model.layers.1.self_attn.q_proj": {"bits": 2, "group_size": 32},
            "model.layers.1.mlp.up_proj": {"bits": 5, "group_size": 64},
        },
    },
    "dense leftovers": {
        "dtype": torch.bfloat16,
        "overrides": {
            "model.layers.0.self_attn.k_proj": False,
            "model.layers.1.mlp.up_proj": False,
        },
    },
    "dense head": {
        "tied": False,
        "dtype": torch.float16,
        "overrides": {"lm_head": False, "model.embed_tokens": False},
    },
    "dense tied table": {"overrides": {"model.embed_tokens": False}},
    "rope theta": {"config": {"rope_theta": 5e5}},
    "rope linear": {"config": {"rope_scaling": {"type": "linear", "factor": 4.0}}},
    "rope dynamic": {
        "config": {
            "rope_scaling": {"type": "dynamic", "factor": 3.0},
            "max_position_embeddings": 32,
        }
    },
    "rope llama3": {"config": {"rope_scaling": LLAMA3}},
    "rope yarn": {"config": {"rope_scaling": YARN}},
    "rope yarn, two mscales": {
        "config": {"rope_scaling": YARN | {"mscale": 0.9, "mscale_all_dim": 0.4, "beta_fast": 16}}
    },
}


def as_mlx(path):
    model, _ = mlx_load_model(Path(path))
    model.set_dtype(mx.float32)
    return model


def mlx_logits(model, ids, cache=None):
    return torch.from_numpy(np.array(model(mx.array(ids.numpy()), cache=cache)))


def assert_close(logits, expected):
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() <= BOUND * expected.abs().max()


def check_logits(path, vocab_size, expected_model=None):
    """A prompt of 48 tokens at once, then 8 tokens one by one from the cache."""
    model = load_model(path, dtype=torch.float32, max_kv_size=128)
    assert model.kv_dtype == torch.float32
    reference = expected_model or as_mlx(path)
    ids = torch.randint(vocab_size, (1, 56))
    assert_close(model(ids[:, :48]), mlx_logits(reference, ids[:, :48]))
    cache, expected_cache = model.make_cache(), make_prompt_cache(reference)
    expected = mlx_logits(reference, ids[:, :48], expected_cache)
    assert_close(model(ids[:, :48], [cache]), expected)
    for i in range(48, 56):
        expected = mlx_logits(reference, ids[:, i : i + 1], expected_cache)
        assert_close(model(ids[:, i : i + 1], [cache]), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_of_tiny_models(tmp_path, family, name):
    options = dict(MODELS[name])
    if family == "qwen2":
        # Qwen2 has no such fields: its biases are always there, its heads share hidden_size.
        options.pop("attention_bias", None), options.pop("mlp_bias", None)
        if name in ("no sharing", "odd head_dim"):
            options |= {"head_dim": None, "hidden_size": options.get("heads", 4) * 32}
    model = tiny.write_tiny(tmp_path / "model", family, **options)
    check_logits(model.path, tiny.VOCAB_SIZE)


@pytest.mark.parametrize(
    ("module", "fields", "dtype", "recipe", "options"),
    [
        (llama, {"tie_word_embeddings": True}, mx.bfloat16, None, {}),
        (qwen2, {"tie_word_embeddings": False}, mx.float16, None, {"group_size": 32}),
        (llama, {"tie_word_embeddings": False}, mx.bfloat16, "mixed_3_6", {"bits": 4}),
        (llama, {"tie_word_embeddings": True}, mx.bfloat16, None, {"group_size": 128}),
        (qwen2, {"tie_word_embeddings": True}, mx.float32, "mixed_2_6", {"bits": 4}),
    ],
    ids=["llama", "qwen2 g32", "mixed_3_6", "g128, dense down_proj", "mixed_2_6"],
)
def test_logits_of_checkpoints_that_mlx_lm_wrote(tmp_path, module, fields, dtype, recipe, options):
    """Random weights, quantized and saved by mlx-lm itself; K = 704 leaves g128 matrices dense."""
    mx.random.seed(1)
    config = {
        "model_type": module.__name__.rpartition(".")[2],
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "intermediate_size": 704,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        **fields,
    }
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(tree_map(lambda x: x.astype(dtype), model.parameters()))
    group_size = options.get("group_size", 64)
    predicate = mixed_quant_predicate_builder(recipe, model, group_size) if recipe else None
    model, config = quantize_model(
        model, config, group_size, options.get("bits", 4), quant_predicate=predicate
    )
    path = tmp_path / "model"
    save_model(path, model)
    save_config(config, path / "config.json")
    check_logits(path, 512)


def test_tie_word_embeddings_may_be_missing(tmp_path):
    path = tiny.write_tiny(tmp_path / "model", tied=True).path
    tiny.edit_json(path / "config.json", tie_word_embeddings=None)
    check_logits(path, tiny.VOCAB_SIZE)


@pytest.fixture(scope="module")
def smollm2():
    path = builtin_model()
    return load_model(path, dtype=torch.float32), as_mlx(path), Tokenizer.from_dir(path)


def test_smollm2_logits_and_64_greedy_tokens(smollm2):
    """A short prompt: MLX takes 0.1 s a token of it on the CPU."""
    model, reference, tokenizer = smollm2
    prompt = tokenizer.encode("The sky looks blue during the day because")
    cache, expected_cache = model.make_cache(), make_prompt_cache(reference)
    ids, expected_tokens = torch.tensor([prompt]), []
    for _ in range(64):
        expected = mlx_logits(reference, ids, expected_cache)
        logits = model(ids, [cache])
        assert_close(logits, expected)
        expected_tokens.append(int(expected[0, -1].argmax()))
        assert int(logits[0, -1].argmax()) == expected_tokens[-1]
        ids = torch.tensor([expected_tokens[-1:]])
    assert len(set(expected_tokens)) > 20  # no loop of a few words
    # The loop went through the modules, this goes through the decode plan.
    steps = generate_step(prompt, model, max_tokens=64)
    assert [token for token, _ in steps] == expected_tokens


def test_smollm2_config_is_read_as_mlx_reads_it(smollm2):
    model, reference, _ = smollm2
    raw = json.loads((model.checkpoint.path / "config.json").read_text())
    assert raw["model_type"] == "llama"
    for name in ("hidden_size", "num_hidden_layers", "rms_norm_eps", "head_dim", "vocab_size"):
        expected = getattr(reference.args, name) or reference.layers[0].self_attn.head_dim
        assert getattr(model.config, name) == expected, name
