"""What a GGUF file says about the computation is converted, or refused in one sentence."""

import json
import math
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_models import HEADS, HIDDEN, convert_gguf, write_gguf
from sentence import assert_one_sentence

from torch_q4metal.errors import CheckpointError, ConfigError, Q4MetalError, TokenizerError
from torch_q4metal.gguf_checkpoint import GgufCheckpoint

HEAD_DIM = HIDDEN // HEADS


def llama3_table(factor: float, original: int = 8192) -> np.ndarray:
    """Frequency divisors, one after the other, as the definition of llama3 rope has them."""
    table = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * math.pi * 10000.0 ** (2 * i / HEAD_DIM)
        if wavelength < original / 4:
            table.append(1.0)
        elif wavelength > original / 1:
            table.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            table.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(table, dtype=np.float32)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
SCALING = [
    ({"rope.scaling.type": "none"}, None),
    (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5},
        {"rope_type": "linear", "factor": 2.5},
    ),
    ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
        },
        YARN,
    ),
    (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.attn_factor": 1.0,
        },
        YARN | {"beta_fast": 16.0},
    ),
]


@pytest.mark.parametrize(("changes", "expected"), SCALING)
def test_rope_scaling(
    tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    model = write_gguf(
        tmp_path / "a.gguf", metadata={f"llama.{key}": v for key, v in changes.items()}
    )
    assert convert_gguf(model, tmp_path / "out").get("rope_scaling") == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recognised(tmp_path: Path, factor: float) -> None:
    table = llama3_table(factor, 1024)
    assert 1.0 in table
    assert np.any((table > 1.0) & (table < factor))
    original = {"llama.rope.scaling.original_context_length": 1024}
    model = write_gguf(tmp_path / "a.gguf", metadata=original, tensors={"rope_freqs.weight": table})
    assert convert_gguf(model, tmp_path / "out")["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }


def test_rope_table_of_ones_is_no_scaling(tmp_path: Path) -> None:
    ones = np.ones(HEAD_DIM // 2, dtype=np.float32)
    config = convert_gguf(
        write_gguf(tmp_path / "a.gguf", tensors={"rope_freqs.weight": ones}), tmp_path / "out"
    )
    assert "rope_scaling" not in config


def test_further_metadata(tmp_path: Path) -> None:
    changes = {
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.feed_forward_length": [96, 96],
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 20,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_templates": ["tool_use", "../evil"],
        "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.chat_template.../evil": "outside",
    }
    config = convert_gguf(write_gguf(tmp_path / "a.gguf", metadata=changes), tmp_path / "out")
    assert config["head_dim"] == 16
    assert config["eos_token_id"] == [2, 3, 0]  # eos, eot, and <|endoftext|> by its name
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["temperature"] == 0.7
    assert generation["top_k"] == 20
    assert generation["do_sample"] is True
    assert generation["eos_token_id"] == [2, 3, 0]
    extra = tmp_path / "out" / "additional_chat_templates"
    assert [file.name for file in extra.iterdir()] == ["tool_use.jinja"]
    assert (extra / "tool_use.jinja").read_text() == "tools"


# --- errors ---------------------------------------------------------------------------------------

CONFIG_ERRORS = [
    ({"llama.rope.scaling.type": "longrope"}, "longrope"),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.attn_factor": 0.5}, "attn_factor"),
    ({"llama.attention.sliding_window": 4096}, "sliding_window"),
    ({"llama.attention.clamp_kqv": 8.0}, "clamp_kqv"),
    ({"llama.attention.scale": 0.5}, "scale"),
    ({"llama.attention.causal": False}, "causal"),
    ({"llama.expert_count": 8}, "expert_count"),
    ({"llama.logit_scale": 2.0}, "logit_scale"),
    ({"llama.attention.value_length": 32}, "value_length"),
    ({"llama.rope.dimension_count": 8}, "dimension_count"),
    ({"llama.feed_forward_length": [96, 64]}, "feed_forward_length"),
    ({"llama.attention.head_count": 0}, "0 heads"),
    ({"llama.attention.head_count": 3}, "3 heads"),
]


@pytest.mark.parametrize(("changes", "word"), CONFIG_ERRORS)
def test_config_that_is_not_built(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    path = write_gguf(tmp_path / "a.gguf", metadata=changes).path
    with pytest.raises(ConfigError) as error:
        GgufCheckpoint(path)
    assert_one_sentence(error.value, str(path), word)


@pytest.mark.parametrize(
    "key", ["block_count", "embedding_length", "attention.head_count", "context_length"]
)
def test_missing_and_wrong_metadata(tmp_path: Path, key: str) -> None:
    for value in (None, "\x1b[31mred"):
        path = write_gguf(tmp_path / "a.gguf", metadata={f"llama.{key}": value}).path
        with pytest.raises(CheckpointError) as error:
            GgufCheckpoint(path)
        assert_one_sentence(error.value, str(path), f"llama.{key}")


def test_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError) as error:
        GgufCheckpoint(path)
    assert_one_sentence(error.value, "mamba", "llama and qwen2")


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K", "Q5_0", "IQ4_NL"])
def test_other_tensor_types(tmp_path: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "a.gguf").path
    reader = gguf.GGUFReader(path, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    _, _, _, dims, raw_type, _ = tensor.field.parts
    raw_type[0] = int(gguf.GGMLQuantizationType[kind])
    dims[:] = 256, 8  # whole blocks of every kind
    reader.data.flush()
    with pytest.raises(CheckpointError) as error:
        GgufCheckpoint(path)
    assert_one_sentence(error.value, "token_embd.weight", kind, "Q4_0")


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    small = np.zeros(32, dtype=np.float32)
    cases: list[tuple[dict[str, np.ndarray | None], str]] = [
        ({"blk.1.ffn_down.weight": None}, "blk.1.ffn_down.weight"),
        ({"token_embd.weight": None}, "token_embd.weight"),
        ({"output_norm.weight": small}, "output_norm.weight"),
        ({"blk.0.attn_q.bias": small}, "blk.0.attn_q.bias"),
        ({"blk.0.ffn_gate_exps.weight": small}, "blk.0.ffn_gate_exps.weight"),
        ({"blk.0.\x07odd": small}, "odd"),
    ]
    for tensors, word in cases:
        write_gguf(path, tensors=tensors)
        with pytest.raises(CheckpointError) as error:
            GgufCheckpoint(path)
        assert_one_sentence(error.value, str(path), word)


def test_foreign_rope_table(tmp_path: Path) -> None:
    table = np.linspace(1.0, 3.0, HEAD_DIM // 2, dtype=np.float32)
    path = write_gguf(tmp_path / "a.gguf", tensors={"rope_freqs.weight": table}).path
    with pytest.raises(ConfigError) as error:
        GgufCheckpoint(path)
    assert_one_sentence(error.value, "rope_freqs.weight")


@pytest.mark.parametrize(
    ("kind", "scale"), [("Q4_0", 20000.0), ("Q8_0", 600.0), ("Q4_1", math.nan)]
)
def test_scales_beyond_float16(tmp_path: Path, kind: str, scale: float) -> None:
    path = write_gguf(tmp_path / "a.gguf", kinds={"*": kind}).path
    reader = gguf.GGUFReader(path, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight")
    tensor.data[5, :2] = np.array([scale], dtype=np.float16).view(np.uint8)
    reader.data.flush()
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError) as error:
        GgufCheckpoint(path).write(tmp_path / "out")
    assert_one_sentence(error.value, "blk.1.ffn_up.weight")


def test_damaged_files(tmp_path: Path) -> None:
    """Cut anywhere, or with any byte of the header changed: an error of ours, or a model."""
    whole = write_gguf(tmp_path / "a.gguf").path.read_bytes()
    path = tmp_path / "damaged.gguf"
    generator = random.Random(0)
    cuts = [0, 3, 4, 8, 24, len(whole) - 1] + [generator.randrange(len(whole)) for _ in range(12)]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError) as error:
            GgufCheckpoint(path)
        assert_one_sentence(error.value, str(path))
    lies = [(8, 2**63), (16, 2**40)]  # number of tensors, number of keys
    for offset, value in lies:
        path.write_bytes(whole[:offset] + value.to_bytes(8, "little") + whole[offset + 8 :])
        with pytest.raises(CheckpointError) as error:
            GgufCheckpoint(path)
        assert_one_sentence(error.value, str(path))
    # An array that claims more elements than the file holds is not read one by one.
    at = whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    path.write_bytes(whole[:at] + (2**22).to_bytes(8, "little") + whole[at + 8 :])
    with pytest.raises(CheckpointError) as error:
        GgufCheckpoint(path)
    assert_one_sentence(error.value, str(path), "the file ends at")
    for _ in range(30):
        position = generator.randrange(1200)
        path.write_bytes(
            whole[:position] + bytes([generator.randrange(256)]) + whole[position + 1 :]
        )
        try:
            GgufCheckpoint(path)
        except Q4MetalError as error:
            assert_one_sentence(error)


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model at all, only text")
    for path in (tmp_path / "text.gguf", tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(CheckpointError) as error:
            GgufCheckpoint(path)
        assert_one_sentence(error.value, str(path))


def test_missing_part(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "a-00001-of-00003.gguf", split=3).path
    second = tmp_path / "a-00002-of-00003.gguf"
    second.unlink()
    with pytest.raises(CheckpointError) as error:
        GgufCheckpoint(first)
    assert_one_sentence(error.value, second.name)
    with pytest.raises(CheckpointError) as error:
        GgufCheckpoint(tmp_path / "a-00003-of-00003.gguf")
    assert_one_sentence(error.value, "name the first")


TOKENIZER_ERRORS = [
    ({"tokenizer.ggml.pre": "mystery"}, "mystery"),
    ({"tokenizer.ggml.pre": None}, "default"),
    ({"tokenizer.ggml.model": "bert"}, "bert"),
    ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges"),
    ({"tokenizer.ggml.merges": ["h q7"]}, "merges"),
    ({"tokenizer.ggml.token_type": [1, 1]}, "types"),
    ({"tokenizer.ggml.eos_token_id": 99999}, "99999"),
    ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores"),
]


@pytest.mark.parametrize(("changes", "word"), TOKENIZER_ERRORS)
def test_tokenizer_that_is_not_built(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    path = write_gguf(tmp_path / "a.gguf", metadata=changes).path
    with pytest.raises((TokenizerError, CheckpointError)) as error:
        convert_gguf(path, tmp_path / "out")
    assert_one_sentence(error.value, str(path), word)
