"""config.json of the families: what changes the computation and is not built is refused."""

import pytest
import tiny
import torch
from sentence import assert_one_sentence

from torch_q4metal.errors import ConfigError, Q4MetalError
from torch_q4metal.models import load_model


def load(tmp_path, family="llama", **options):
    return load_model(tiny.write_tiny(tmp_path / "m", family, **options).path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "mamba"}, ["'mamba'", "llama, qwen2"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"logits_scaling": 8.0}, ["logits_scaling", "8.0"]),
        ({"logit_scale": 0.5}, ["logit_scale", "0.5"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping", "30.0"]),
        ({"scale_emb": True}, ["scale_emb", "True"]),
        ({"rope_traditional": True}, ["rope_traditional", "True"]),
        ({"num_local_experts": 8}, ["num_local_experts", "8"]),
        ({"residual_multiplier": 0.2}, ["residual_multiplier", "0.2"]),
        ({"no_rope_layers": [1, 0]}, ["no_rope_layers", "[1, 0]"]),
        ({"rope_scaling": {"type": "longrope"}}, ["longrope"]),
        ({"layer_types": ["full_attention", "linear_attention"]}, ["linear_attention"]),
        ({"layer_types": "full"}, ["layer_types", "'full'"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_attention_heads": True}, ["num_attention_heads", "True"]),
        ({"num_key_value_heads": 3}, ["4", "3", "evenly"]),
        ({"num_attention_heads": 6, "head_dim": None}, ["64", "6", "head_dim"]),
        ({"head_dim": 15}, ["head_dim", "15", "even"]),
        ({"rms_norm_eps": None}, ["rms_norm_eps"]),
        ({"rms_norm_eps": -1e-5}, ["rms_norm_eps", "-1e-05"]),
        ({"mlp_bias": "yes"}, ["mlp_bias", "'yes'"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "1"]),
    ],
)
def test_what_a_config_asks_for_and_is_not_built_or_wrong(tmp_path, fields, words):
    path = tiny.write_tiny(tmp_path / "m").path
    tiny.edit_json(path / "config.json", **fields)
    with pytest.raises(ConfigError) as error:
        load_model(path)
    assert_one_sentence(error.value, "config.json", *words)


def test_values_that_change_nothing_are_taken(tmp_path):
    fields = {
        "hidden_act": "swish",
        "logit_scale": 1.0,
        "logits_scaling": 1,
        "partial_rotary_factor": 1.0,
        "num_local_experts": 0,
        "layer_types": ["full_attention", "full_attention"],
        "sliding_window": 8,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "attention_dropout": 0.0,
    }
    assert load(tmp_path, config=fields).config.sliding_window is None


SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 100}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", SLIDING),
        ("qwen2", SLIDING | {"use_sliding_window": True}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 100}),
    ],
)
def test_a_sliding_window_that_would_take_effect(tmp_path, family, fields):
    path = tiny.write_tiny(tmp_path / "m", family, config=fields).path
    with pytest.raises(ConfigError) as error:
        load_model(path)
    assert_one_sentence(error.value, "config.json", "max_kv_size=100", "sliding_window")
    assert load_model(path, max_kv_size=100).max_kv_size == 100


@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": False, "max_window_layers": 1, "sliding_window": 100},
        {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 100},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 131072},
        SLIDING,  # not switched on
    ],
)
def test_a_sliding_window_that_would_not(tmp_path, fields):
    assert load(tmp_path, "qwen2", config=fields).max_kv_size == 512


def test_sliding_layers_without_a_window(tmp_path):
    path = tiny.write_tiny(tmp_path / "m", config=SLIDING | {"sliding_window": "wide"}).path
    with pytest.raises(ConfigError) as error:
        load_model(path)
    assert_one_sentence(error.value, "sliding_window", "'wide'")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "mps"}, ["'mps'", "no Metal GPU", "cpu"]),
        ({"device": torch.device("mps", 0)}, ["mps", "no Metal GPU"]),
        ({"device": "cuda:1"}, ["'cuda:1'", "cpu"]),
        ({"dtype": torch.float64}, ["float64", "bfloat16"]),
        ({"precision": "sloppy"}, ["'sloppy'", "'fast'"]),
    ],
)
def test_options_that_do_not_exist(tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    path = tiny.write_tiny(tmp_path / "m").path
    with pytest.raises(Q4MetalError) as error:
        load_model(path, **options)
    assert_one_sentence(error.value, *words)
