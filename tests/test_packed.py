"""load_packed: transformers models on packed weights compute what they compute on dense ones."""

import copy
import pickle

import pytest
import torch
import transformers
from safetensors.torch import save_file
from sentence import assert_one_sentence
from tiny import ARCHITECTURES, edit_json, write_tiny
from torch import nn

from torch_q4metal import Q4Embedding, Q4Linear, load_packed
from torch_q4metal.checkpoint import Checkpoint
from torch_q4metal.errors import CheckpointError, Q4MetalError
from torch_q4metal.packed import TiedHead

MIXED = {
    "model.embed_tokens": {"bits": 8, "group_size": 32},
    "model.layers.0.self_attn.v_proj": {"bits": 6, "group_size": 64},
    "model.layers.1.mlp.down_proj": {"bits": 3, "group_size": 32},
    "model.layers.0.mlp.gate_proj": False,
}
FAMILY_OPTIONS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"head_dim": 32},
    "mistral": {"head_dim": 32},
}
ROPES = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"rope_type": "linear", "factor": 2.0},
}


def on_meta(path):
    """The transformers model of a directory, without storage."""
    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def dense_twin(model):
    """The transformers model with the weights that the packed tensors stand for, in float32."""
    config = transformers.AutoConfig.from_pretrained(model.path)
    config.tie_word_embeddings = "lm_head.weight" not in model.dense
    twin = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    result = twin.load_state_dict({k: v.float() for k, v in model.dense.items()}, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}
    return twin


def greedy(model, ids, count=12):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )


def refusal(action, *words, error=CheckpointError):
    with pytest.raises(error) as caught:
        action()
    assert_one_sentence(caught.value, *words)


# --- the same answers ---


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_same_logits_and_text_as_dense_weights(tmp_path, family, tied):
    options = FAMILY_OPTIONS.get(family, {})
    model = write_tiny(tmp_path, family, tied=tied, overrides=MIXED, shards=2, **options)
    packed = on_meta(tmp_path)
    assert load_packed(packed, tmp_path, precision="exact") is packed
    twin = dense_twin(model)
    ids = torch.randint(0, 256, (2, 9))
    expected, logits = twin(ids).logits, packed(ids).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(greedy(packed, ids), greedy(twin, ids))


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
@torch.no_grad()
def test_rotary_buffers_are_recomputed(tmp_path, rope):
    model = write_tiny(tmp_path, config={"rope_scaling": rope})
    packed, twin = load_packed(on_meta(tmp_path), tmp_path, precision="exact"), dense_twin(model)
    expected = dict(twin.model.rotary_emb.named_buffers())
    for name, buffer in packed.model.rotary_emb.named_buffers():
        assert torch.equal(buffer, expected[name])
    ids = torch.randint(0, 256, (1, 100))
    torch.testing.assert_close(packed(ids).logits, twin(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_checkpoint(tmp_path, dtype):
    model = write_tiny(tmp_path, "qwen2", tied=False, dtype=dtype, overrides=MIXED)
    packed, twin = load_packed(on_meta(tmp_path), tmp_path, precision="exact"), dense_twin(model)
    ids = torch.randint(0, 256, (1, 9))
    logits, expected = packed(ids).logits, twin(ids).logits
    assert logits.dtype == dtype
    same_dtype = twin.to(dtype)(ids).logits  # what rounding to this dtype costs anyway
    bound = 2 * (same_dtype - expected).abs().max()
    assert (logits - expected).abs().max() <= bound


@torch.no_grad()
def test_dense_checkpoint_fills_the_same_way(tmp_path):
    model = write_tiny(tmp_path, bits=None)
    packed, twin = load_packed(on_meta(tmp_path), tmp_path), dense_twin(model)
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    ids = torch.randint(0, 256, (1, 9))
    assert torch.equal(packed(ids).logits, twin(ids).logits)


@torch.no_grad()
def test_text_model_of_a_vision_checkpoint(tmp_path):
    config = write_tiny(tmp_path / "plain", "mistral").path
    model = write_tiny(tmp_path / "nested", "mistral", nested=True)
    for prefix in ("", "language_model."):
        packed = load_packed(on_meta(config), model.path, precision="exact", prefix=prefix)
        ids = torch.randint(0, 256, (1, 5))
        assert packed(ids).logits.shape == (1, 5, 260)
        assert isinstance(packed.model.layers[0].mlp.up_proj, Q4Linear)


# --- what the filled module is made of ---


def test_layers_are_packed_with_their_own_parameters(tmp_path):
    write_tiny(tmp_path, overrides=MIXED)
    packed = load_packed(on_meta(tmp_path), tmp_path, precision="exact")
    layers = packed.model.layers
    assert isinstance(packed.model.embed_tokens, Q4Embedding)
    assert packed.model.embed_tokens.bits == 8
    assert (layers[0].self_attn.v_proj.bits, layers[0].self_attn.v_proj.group_size) == (6, 64)
    assert (layers[1].mlp.down_proj.bits, layers[1].mlp.down_proj.group_size) == (3, 32)
    assert type(layers[0].mlp.gate_proj) is nn.Linear
    matrices = [part for part in packed.modules() if isinstance(part, Q4Linear | Q4Embedding)]
    assert len(matrices) == 14  # 7 in each of 2 layers, the table, without the dense one
    assert {part.precision for part in matrices} == {"exact"}
    tensors = [*packed.parameters(), *packed.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize("tied", [True, False])
def test_state_dict_has_the_names_and_bytes_of_the_checkpoint(tmp_path, tied):
    model = write_tiny(tmp_path, "qwen2", tied=tied, overrides=MIXED)
    state = load_packed(on_meta(tmp_path), tmp_path).state_dict()
    assert set(state) == set(model.tensors)
    for name, tensor in state.items():
        expected = model.tensors[name]
        if expected.dtype == torch.int32:
            assert tensor.dtype == torch.uint32
            tensor = tensor.view(torch.int32)
        assert torch.equal(tensor, expected)


def test_weights_stay_in_the_mapped_file(tmp_path):
    write_tiny(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    packed = load_packed(on_meta(tmp_path), checkpoint)
    for name, tensor in packed.state_dict().items():
        assert tensor.data_ptr() == checkpoint.tensor(name).data_ptr(), name


def test_tied_head_is_the_table_itself(tmp_path):
    write_tiny(tmp_path)
    packed = load_packed(on_meta(tmp_path), tmp_path, precision="exact")
    assert isinstance(packed.lm_head, TiedHead)
    assert packed.lm_head.embedding is packed.model.embed_tokens
    assert "in_features=64, out_features=260" in repr(packed.lm_head)
    twin = copy.deepcopy(packed)
    assert twin.lm_head.embedding is twin.model.embed_tokens
    assert twin.model.embed_tokens is not packed.model.embed_tokens


def test_files_decide_whether_the_head_is_tied(tmp_path):
    write_tiny(tmp_path / "untied", tied=False)
    edit_json(tmp_path / "untied" / "config.json", tie_word_embeddings=True)
    packed = on_meta(tmp_path / "untied")
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    load_packed(packed, tmp_path / "untied")
    assert isinstance(packed.lm_head, Q4Linear)
    assert packed.config.tie_word_embeddings is False  # transformers shall not tie it again
    write_tiny(tmp_path / "tied", tied=True)
    edit_json(tmp_path / "tied" / "config.json", tie_word_embeddings=None)
    packed = on_meta(tmp_path / "tied")
    assert packed.lm_head.weight is not packed.model.embed_tokens.weight
    assert isinstance(load_packed(packed, tmp_path / "tied").lm_head, TiedHead)
    # The head of an explicitly untied model must be there: half a download is no tied model.
    edit_json(tmp_path / "tied" / "config.json", tie_word_embeddings=False)
    refusal(lambda: load_packed(on_meta(tmp_path / "tied"), tmp_path / "tied"), "lm_head.weight")


def test_mode_and_gradient_flags_are_kept(tmp_path):
    write_tiny(tmp_path, "qwen2")
    packed = on_meta(tmp_path).train()
    packed.model.norm.weight.requires_grad_(False)
    packed.model.layers[0].self_attn.q_proj.bias.requires_grad_(False)
    load_packed(packed, tmp_path)
    assert all(part.training for part in packed.modules())
    evaluating = load_packed(on_meta(tmp_path), tmp_path)
    assert not any(part.training for part in evaluating.modules())
    assert not packed.model.norm.weight.requires_grad
    assert packed.model.layers[0].input_layernorm.weight.requires_grad
    assert not packed.model.layers[0].self_attn.q_proj.bias.requires_grad
    assert packed.model.layers[0].self_attn.k_proj.bias.requires_grad


@torch.no_grad()
def test_casts_copies_and_pickles(tmp_path):
    write_tiny(tmp_path)
    packed = load_packed(on_meta(tmp_path), tmp_path)
    ids = torch.randint(0, 256, (1, 9))
    expected = packed(ids).logits
    assert torch.equal(copy.deepcopy(packed)(ids).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(packed))(ids).logits, expected)
    layer = packed.model.layers[0].mlp.up_proj
    assert len(pickle.dumps(layer)) < 2 * sum(b.nbytes for b in layer.buffers())  # not the file
    packed.to(torch.bfloat16)
    assert packed.model.norm.weight.dtype == torch.bfloat16
    assert layer.scales.dtype == torch.float32


def test_filling_a_filled_module_again(tmp_path):
    first, second = (write_tiny(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    again = load_packed(load_packed(on_meta(first.path), first.path), second.path)
    fresh = load_packed(on_meta(first.path), second.path)
    ids = torch.randint(0, 256, (1, 9))
    assert torch.equal(again(ids).logits, fresh(ids).logits)
    assert again.lm_head.embedding is again.model.embed_tokens


def test_module_made_on_the_cpu_and_inside_the_meta_context(tmp_path):
    model = write_tiny(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    on_cpu = load_packed(transformers.AutoModelForCausalLM.from_config(config), tmp_path)
    with torch.device("meta"):
        inside = transformers.AutoModelForCausalLM.from_config(config)
        load_packed(inside, tmp_path)
    for packed in (on_cpu, inside):
        assert not any(t.is_meta for t in (*packed.parameters(), *packed.buffers()))
        assert torch.equal(packed.model.norm.weight, model.dense["model.norm.weight"])


# --- what is refused ---


def test_missing_layer_of_a_model_is_named(tmp_path):
    model = write_tiny(tmp_path)
    edit_json(tmp_path / "config.json", num_hidden_layers=3)
    refusal(lambda: load_packed(on_meta(tmp_path), tmp_path), "model.layers.2.", "no tensor")
    edit_json(tmp_path / "config.json", num_hidden_layers=1)
    refusal(lambda: load_packed(on_meta(tmp_path), tmp_path), "model.layers.1.", "no place")
    assert model.config["num_hidden_layers"] == 2


def test_rotary_tables_of_old_checkpoints_are_ignored(tmp_path):
    model = write_tiny(tmp_path)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    save_file(old, tmp_path / "model-extra.safetensors")
    packed = load_packed(on_meta(tmp_path), tmp_path)
    assert torch.equal(packed.model.norm.weight, model.dense["model.norm.weight"])


def test_explicit_entry_that_disagrees_names_the_tensor(tmp_path):
    write_tiny(tmp_path)
    entry = {"bits": 4, "group_size": 32, "model.norm": False}
    entry["model.layers.1.mlp.up_proj"] = {"bits": 8, "group_size": 32}
    edit_json(tmp_path / "config.json", quantization=entry)
    refusal(
        lambda: load_packed(on_meta(tmp_path), tmp_path), "model.layers.1.mlp.up_proj", "8 bits"
    )


def test_devices_without_kernels(tmp_path):
    write_tiny(tmp_path)
    packed = load_packed(on_meta(tmp_path), tmp_path, device="cpu")
    for device in ("cuda", torch.device("cuda:0")):
        refusal(
            lambda d=device: load_packed(packed, tmp_path, device=d),
            str(device),
            error=Q4MetalError,
        )
