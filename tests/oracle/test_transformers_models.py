"""Logits against transformers in f32, for what mlx-lm reads wrongly or not at all.

That is rope_parameters of transformers 5, and YaRN's attention_factor and truncate. Dynamic RoPE is
here too, as is ``load_model`` of a dense checkpoint that transformers itself has saved.
"""

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from torch_q4metal.models import load_model

CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
BOUND = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 2e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, attention_factor": YARN | {"attention_factor": 0.7},
    "yarn, no truncate": YARN | {"truncate": False},
    "yarn, mscales": YARN | {"mscale": 1.3, "mscale_all_dim": 0.6, "beta_slow": 2.0},
    "yarn, one mscale": YARN | {"mscale": 1.3},
}


def expected_model(family, config, weights):
    config_class, model_class = CLASSES[family]
    ignored = ("architectures", "quantization", "quantization_config", "torch_dtype")
    fields = {key: value for key, value in config.items() if key not in ignored}
    model = model_class(config_class(**fields, attn_implementation="eager"))
    weights = {name: tensor.float() for name, tensor in weights.items()}
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.eval()


def check(model, reference, count=48):
    """A prompt at once without and with cache, then tokens one by one."""
    ids = torch.randint(tiny.VOCAB_SIZE, (1, count + 4))
    with torch.no_grad():
        expected = reference(ids[:, :count], use_cache=True)
        bound = BOUND * expected.logits.abs().max()
        cache = model.make_cache()
        for logits in (model(ids[:, :count]), model(ids[:, :count], [cache])):
            assert (logits - expected.logits).abs().max() <= bound
        past = expected.past_key_values
        for i in range(count, count + 4):
            expected = reference(ids[:, i : i + 1], past_key_values=past, use_cache=True)
            logits = model(ids[:, i : i + 1], [cache])
            assert (logits - expected.logits).abs().max() <= bound


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("family", CLASSES)
def test_rope_parameters(tmp_path, family, name):
    longest = 32 if name == "dynamic" else 128
    fields = {"rope_parameters": ROPES[name], "max_position_embeddings": longest}
    written = tiny.write_tiny(
        tmp_path / "model", family, config=fields | {"rope_theta": None}, tied=False
    )
    model = load_model(written.path, dtype=torch.float32, max_kv_size=64)
    assert model.config.rope.rope_type == ROPES[name]["rope_type"]
    check(model, expected_model(family, written.config, written.dense))


def test_rope_parameters_of_each_kind_of_layer(tmp_path):
    """Qwen2 as transformers 5 may save it: one entry a kind, all of them equal."""
    fields = {
        "layer_types": ["full_attention", "full_attention"],
        "rope_parameters": {"full_attention": YARN, "sliding_attention": YARN},
    }
    flat = {"rope_parameters": YARN}
    logits = []
    for name, config in (("nested", fields), ("flat", flat)):
        path = tiny.write_tiny(tmp_path / name, "qwen2", config=config | {"rope_theta": None}).path
        logits.append(load_model(path, dtype=torch.float32)(torch.arange(40)[None]))
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", CLASSES)
def test_biases_and_head_dim(tmp_path, family):
    options = {"attention_bias": True, "mlp_bias": True, "head_dim": 24}
    written = tiny.write_tiny(
        tmp_path / "model", family, tied=False, **(options if family == "llama" else {})
    )
    model = load_model(written.path, dtype=torch.float32)
    check(model, expected_model(family, written.config, written.dense))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CLASSES)
def test_a_checkpoint_that_transformers_saved(tmp_path, family, tied):
    """Dense, with rope_parameters and without rope_theta: nothing in it comes from MLX."""
    config_class, model_class = CLASSES[family]
    torch.manual_seed(3)
    config = config_class(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=tiny.VOCAB_SIZE,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
        initializer_range=0.3,
    )
    reference = model_class(config).eval()
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    assert model.config.rope.rope_theta == 12345.0
    assert model.config.tied == tied
    check(model, reference)
