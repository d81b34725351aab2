"""config.json and generation_config.json: what is read, and what is refused in one sentence."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence import assert_one_sentence
from tiny import edit_json, write_json

from torch_q4metal.config import (
    GenerationDefaults,
    Quantization,
    QuantParams,
    read_checkpoint_config,
    read_json,
)
from torch_q4metal.errors import ConfigError

AFFINE = {"group_size": 64, "bits": 4, "mode": "affine"}


@pytest.fixture
def model(tmp_path):
    write_json(
        tmp_path / "config.json", {"model_type": "llama", "eos_token_id": 2, "quantization": AFFINE}
    )
    return tmp_path


def test_plain_config(model):
    config = read_checkpoint_config(model)
    assert config.model_type == "llama"
    assert config.raw["eos_token_id"] == 2
    assert config.quantization == Quantization(QuantParams(4, 64), {})
    assert config.eos_token_ids == (2,)
    assert config.generation == GenerationDefaults()


def test_dense_config_has_no_quantization(model):
    edit_json(model / "config.json", quantization=None)
    assert read_checkpoint_config(model).quantization is None


def test_overrides_false_true_and_partial_entries(model):
    entries = {
        "model.embed_tokens": {"bits": 8, "group_size": 32, "mode": "affine"},
        "model.layers.0.mlp.down_proj": {"bits": 6},
        "model.layers.1.mlp.down_proj": True,
        "language_model.lm_head": False,
    }
    edit_json(model / "config.json", quantization=AFFINE | {"group_size": 32} | entries)
    assert read_checkpoint_config(model).quantization == Quantization(
        QuantParams(4, 32),
        {
            "model.embed_tokens": QuantParams(8, 32),
            "model.layers.0.mlp.down_proj": QuantParams(6, 64),  # MLX's default, not the config's
            "lm_head": None,
        },
    )


def test_quantization_config_is_read_where_quantization_is_missing(model):
    edit_json(
        model / "config.json", quantization=None, quantization_config={"group_size": 32, "bits": 8}
    )
    assert read_checkpoint_config(model).quantization == Quantization(QuantParams(8, 32), {})


def test_quantization_of_mlx_wins_over_a_foreign_copy(model):
    edit_json(model / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    assert read_checkpoint_config(model).quantization == Quantization(QuantParams(4, 64), {})


def test_unknown_setting_is_logged(model, caplog):
    edit_json(model / "config.json", quantization=AFFINE | {"rotation": "hadamard"})
    with caplog.at_level(logging.WARNING):
        read_checkpoint_config(model)
    assert "rotation" in caplog.text


def test_text_config_is_merged_over_the_top_level(model):
    outer = {
        "model_type": "mistral3",
        "eos_token_id": 3,
        "hidden_size": 1,
        "tie_word_embeddings": True,
        "quantization": AFFINE,
        "text_config": {
            "model_type": "mistral",
            "eos_token_id": 2,
            "hidden_size": 64,
            "quantization": AFFINE | {"bits": 8},  # MLX's own entry is the outer one
        },
    }
    write_json(model / "config.json", outer)
    config = read_checkpoint_config(model)
    assert config.model_type == "mistral"
    assert config.raw["hidden_size"] == 64
    assert config.raw["tie_word_embeddings"] is True
    assert "text_config" not in config.raw
    assert config.quantization == Quantization(QuantParams(4, 64), {})
    assert set(config.eos_token_ids) == {2, 3}


def test_eos_is_the_union_of_both_files(model):
    write_json(model / "generation_config.json", {"eos_token_id": [128001, 2]})
    assert read_checkpoint_config(model).eos_token_ids == (128001, 2)


def test_generation_defaults(model):
    values = {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.1,
        "repetition_penalty": 1.05,
    }
    write_json(model / "generation_config.json", {"do_sample": True} | values)
    assert read_checkpoint_config(model).generation == GenerationDefaults(**values)
    write_json(model / "generation_config.json", {"do_sample": False} | values)
    assert read_checkpoint_config(model).generation.temperature == 0.0


REFUSED = [
    ({"model_file": "modeling_evil.py"}, ["model_file", "modeling_evil.py"]),
    ({"model_type": None}, ["model_type"]),
    ({"model_type": 7}, ["model_type"]),
    ({"eos_token_id": "</s>"}, ["eos_token_id", "</s>"]),
    ({"eos_token_id": [2, True]}, ["eos_token_id"]),
    ({"eos_token_id": -1}, ["eos_token_id", "-1"]),
    ({"text_config": [1]}, ["text_config", "list"]),
    ({"quantization": 4}, ["quantization", "number"]),
    ({"quantization": AFFINE | {"mode": "mxfp4"}}, ["'mxfp4'", "not built"]),
    ({"quantization": AFFINE | {"mode": "ternary"}}, ["'ternary'", "unknown mode"]),
    ({"quantization": AFFINE | {"bits": 7}}, ["bits", "7", "2, 3, 4, 5, 6, 8"]),
    ({"quantization": AFFINE | {"bits": "4"}}, ["bits", "'4'"]),
    ({"quantization": AFFINE | {"bits": 4.0}}, ["bits", "4.0"]),
    ({"quantization": AFFINE | {"group_size": 48}}, ["group_size", "48", "32, 64, 128"]),
    ({"quantization": AFFINE | {"lm_head": {"bits": 9}}}, ["lm_head", "9"]),
] + [
    ({"quantization": None, "quantization_config": {"quant_method": method, "bits": 4}}, [method])
    for method in ("awq", "gptq", "mxfp4", "bitnet", "compressed-tensors", "fp8", "modelopt")
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_in_one_sentence(model, changes, words):
    edit_json(model / "config.json", **changes)
    with pytest.raises(ConfigError) as caught:
        read_checkpoint_config(model)
    assert_one_sentence(caught.value, "config.json", *words)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -1),
        ("temperature", 10**400),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("top_k", True),
        ("min_p", [0.1]),
        ("repetition_penalty", float("inf")),
    ],
)
def test_refused_generation_default(model, key, value):
    write_json(model / "generation_config.json", {key: value})
    with pytest.raises(ConfigError) as caught:
        read_checkpoint_config(model)
    assert_one_sentence(caught.value, "generation_config.json", key)


DAMAGED = {
    "cut": b'{"model_type": "lla',
    "empty": b"",
    "list": b"[1, 2]",
    "no text": b"\xff\xfe{}",
    "too deep": b'{"a":' + b"[" * 100_000,
    "endless number": b'{"a": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_file_is_named(model, name, content):
    (model / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_checkpoint_config(model)
    assert_one_sentence(caught.value, name)


def test_missing_config_is_named(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_checkpoint_config(tmp_path / "nowhere")
    assert_one_sentence(caught.value, "config.json", "nowhere", "does not exist")


def test_directory_in_place_of_config(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError) as caught:
        read_json(tmp_path / "config.json")
    assert_one_sentence(caught.value, "config.json", "cannot be read")


texts = st.text(alphabet="a.\n\u2028", max_size=3)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(
    [
        "model_type",
        "eos_token_id",
        "quantization",
        "quantization_config",
        "text_config",
        "model_file",
    ]
)
entries = st.sampled_from(["bits", "group_size", "mode", "lm_head", "quant_method"])


@given(values=st.dictionaries(fields, json_values | st.dictionaries(entries, json_values)))
def test_any_json_is_read_or_refused(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("config")
    write_json(path / "config.json", {"model_type": "llama"} | values)
    message = "Fine."
    try:
        read_checkpoint_config(path)
    except ConfigError as error:
        message = str(error)
    assert_one_sentence(message)
