"""A checkpoint directory: tensors in place in the mapped files, and how each matrix is packed."""

import copy
import gc
import logging
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file
from sentence import assert_one_sentence
from tiny import edit_json, write_json, write_shards, write_tiny

from torch_q4metal import ops, reference
from torch_q4metal.checkpoint import Checkpoint
from torch_q4metal.config import AFFINE_BITS, GROUP_SIZES, QuantParams
from torch_q4metal.errors import CheckpointError, ConfigError, Q4MetalError

DOWN = "model.layers.1.mlp.down_proj"


def refusal(action, *words, error=CheckpointError):
    """Runs ``action``, which must fail with one sentence that holds ``words``."""
    with pytest.raises(error) as caught:
        action()
    assert_one_sentence(caught.value, *words)


# --- tensors ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shards", "index"), [(1, "fresh"), (3, "fresh"), (3, "missing"), (3, "stale")]
)
def test_tensors_are_those_of_the_file(tmp_path, dtype, shards, index):
    model = write_tiny(tmp_path, "qwen2", tied=False, dtype=dtype, shards=shards, index=index)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert set(checkpoint.tensors) == set(model.tensors)
    for name, expected in model.tensors.items():
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)
    assert checkpoint.weight_bytes == sum(tensor.nbytes for tensor in model.tensors.values())
    assert checkpoint.scales_dtype == dtype
    assert checkpoint.config.model_type == "qwen2"


def test_dense_checkpoint(tmp_path):
    write_tiny(tmp_path, bits=None, dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.quant_params(DOWN, 96) is None
    assert checkpoint.scales_dtype == torch.bfloat16


def test_names_without_language_model(tmp_path, caplog):
    model = write_tiny(
        tmp_path, "mistral", nested=True, overrides={DOWN: {"bits": 6, "group_size": 32}}
    )
    with caplog.at_level(logging.WARNING):
        checkpoint = Checkpoint.open(tmp_path)
    assert "vision_tower" in caplog.text
    assert set(checkpoint.tensors) == set(model.tensors)
    assert checkpoint.config.model_type == "mistral"
    # Config keys come with the prefix or without it.
    assert checkpoint.quant_params(DOWN, 96) == QuantParams(6, 32)


def test_tensors_lie_in_the_mapped_file(tmp_path):
    write_tiny(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    names = list(checkpoint.tensors)
    bases = {checkpoint.tensor(name).data_ptr() - checkpoint.info(name).begin for name in names}
    assert len(bases) == 1  # all at their file offset from one address: nothing was copied
    assert bases.pop() % 4096 == 0


def test_each_tensor_has_its_own_storage(tmp_path):
    write_tiny(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.tensor(name)
        assert tensor.untyped_storage().nbytes() == info.nbytes
        assert tensor.storage_offset() == 0
    norm = checkpoint.tensor("model.norm.weight")
    assert len(pickle.dumps(norm)) < 2000
    assert torch.equal(copy.deepcopy(norm), norm)


def test_checkpoint_can_be_copied(tmp_path):
    model = write_tiny(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.tensor("model.norm.weight")
    for twin in (copy.deepcopy(checkpoint), pickle.loads(pickle.dumps(checkpoint))):
        assert torch.equal(twin.tensor("model.norm.weight"), model.tensors["model.norm.weight"])


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path):
    write_tiny(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    Checkpoint.open(tmp_path).tensor("model.norm.weight").fill_(7)
    gc.collect()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_deleting_the_file_while_tensors_live_is_safe(tmp_path):
    model = write_tiny(tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
    del checkpoint
    gc.collect()
    shutil.rmtree(tmp_path / "model")
    for name, tensor in tensors.items():
        assert torch.equal(tensor, model.tensors[name])


@pytest.mark.parametrize("spaces", [1, 2, 3])
def test_unpadded_header_as_mlx_writes_it(tmp_path, spaces):
    """Tensors begin at odd addresses: packed ones are used there, dense ones are moved."""
    model = write_tiny(tmp_path)
    shift_data(tmp_path / "model.safetensors", spaces)
    checkpoint = Checkpoint.open(tmp_path)
    for name, expected in model.tensors.items():
        tensor, again = checkpoint.tensor(name), checkpoint.tensor(name)
        assert tensor.untyped_storage().nbytes() == expected.nbytes
        assert torch.equal(tensor, expected)
        path = name.rpartition(".")[0]
        if f"{path}.scales" in model.tensors:
            assert tensor.data_ptr() == again.data_ptr()
        else:
            assert tensor.data_ptr() % tensor.dtype.itemsize == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernels_take_odd_addresses(tmp_path, dtype):
    write_tiny(tmp_path, dtype=dtype, bits=3)
    ids = torch.tensor([[1, 2, 3]])
    for rows in (1, 20):
        x = torch.randn(rows, 64)
        results = []
        for spaces in (0, 1):
            shift_data(tmp_path / "model.safetensors", spaces)
            checkpoint = Checkpoint.open(tmp_path)
            path = "model.layers.0.mlp.up_proj"
            w = [checkpoint.tensor(f"{path}.{key}") for key in ("weight", "scales", "biases")]
            assert w[0].data_ptr() % 4 == spaces
            results.append([
                ops.matmul(x, *w, None, True, 32, 3),
                ops.matmul(x, *w, None, True, 32, 3, precision="exact"),
                ops.matmul(x @ torch.zeros(64, 96), *w, None, False, 32, 3),
                ops.embedding(ids, *w, 32, 3),
                ops.dequantize(*w, 32, 3),
            ])  # fmt: skip
        for padded, odd in zip(*results, strict=True):
            assert torch.equal(padded, odd)


def test_half_precision_at_even_addresses_stays_in_place(tmp_path):
    write_tiny(tmp_path, dtype=torch.bfloat16)
    shift_data(tmp_path / "model.safetensors", 2)
    checkpoint = Checkpoint.open(tmp_path)
    first, second = (checkpoint.tensor("model.norm.weight") for _ in range(2))
    assert first.data_ptr() == second.data_ptr()


def test_file_of_mlx_itself(tmp_path):
    import mlx.core as mx

    write_tiny(tmp_path)
    w = mx.random.normal((64, 128)).astype(mx.bfloat16)
    packed = dict(zip(("weight", "scales", "biases"), mx.quantize(w, 64, 4), strict=True))
    tensors = {f"lm_head.{key}": value for key, value in packed.items()}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors, metadata={"format": "mlx"})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.quant_params("lm_head", 128) == QuantParams(4, 64)
    parts = [checkpoint.tensor(f"lm_head.{key}") for key in packed]
    dense = mx.dequantize(*packed.values(), 64, 4).astype(mx.float32)
    assert reference.dequantize(*parts, 64, 4).float().tolist() == dense.tolist()


def test_empty_tensor(tmp_path):
    write_tiny(tmp_path)
    save_file({"model.empty": torch.zeros(0, 3)}, tmp_path / "model.safetensors")
    assert Checkpoint.open(tmp_path).tensor("model.empty").shape == (0, 3)


@pytest.mark.parametrize("spaces", [0, 1])
def test_file_that_becomes_shorter_after_opening(tmp_path, spaces):
    write_tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    shift_data(file, spaces)
    checkpoint = Checkpoint.open(tmp_path)
    last = max(checkpoint.tensors.values(), key=lambda info: info.end)
    with file.open("r+b") as stream:
        stream.truncate(last.end - 4)
    refusal(lambda: checkpoint.tensor(last.name), "model.safetensors", "shorter")


# --- which files ---


def test_missing_shard_is_named_when_its_tensor_is_wanted(tmp_path):
    write_tiny(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    checkpoint = Checkpoint.open(tmp_path)
    missing = "model.layers.0.mlp.up_proj.weight"
    assert not checkpoint.has(missing)
    refusal(
        lambda: checkpoint.tensor(missing), missing, "model-00002-of-00003.safetensors is missing"
    )


def test_missing_tensor_is_named(tmp_path):
    write_tiny(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    refusal(lambda: checkpoint.tensor("lm_head.weight"), "no tensor lm_head.weight")


def test_tensor_in_two_files_is_settled_by_the_index(tmp_path):
    model = write_tiny(tmp_path)
    save_file({"model.norm.weight": torch.zeros(64)}, tmp_path / "model-old.safetensors")
    tensor = Checkpoint.open(tmp_path).tensor("model.norm.weight")
    assert torch.equal(tensor, model.tensors["model.norm.weight"])
    (tmp_path / "model.safetensors.index.json").unlink()
    refusal(
        lambda: Checkpoint.open(tmp_path),
        "model.norm.weight",
        "model.safetensors",
        "model-old.safetensors",
    )


def test_weights_files_of_old_checkpoints(tmp_path):
    model = write_tiny(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.00.safetensors")
    name = "model.norm.weight"
    assert torch.equal(Checkpoint.open(tmp_path).tensor(name), model.tensors[name])


def test_npz_is_refused(tmp_path):
    write_tiny(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.npz")
    refusal(lambda: Checkpoint.open(tmp_path), "weights.npz", "not read")


def test_directory_without_weights(tmp_path):
    write_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refusal(lambda: Checkpoint.open(tmp_path), str(tmp_path), "no model*.safetensors")


def test_paths_that_are_no_directory(tmp_path):
    write_tiny(tmp_path)
    refusal(
        lambda: Checkpoint.open(tmp_path / "model.safetensors"), "model.safetensors", "is a file"
    )
    refusal(lambda: Checkpoint.open(tmp_path / "nowhere"), "nowhere", "does not exist")


def test_missing_config(tmp_path):
    write_tiny(tmp_path)
    (tmp_path / "config.json").unlink()
    refusal(lambda: Checkpoint.open(tmp_path), "config.json", error=ConfigError)


# --- how matrices are packed ---


def test_scales_dtype_is_that_of_the_scales(tmp_path):
    packed = reference.quantize(torch.randn(8, 64).half(), 64, 4)
    tensors = {f"lm_head.{k}": t for k, t in zip(("weight", "scales", "biases"), packed)}
    norms = {f"model.layers.{i}.input_layernorm.weight": torch.ones(64) for i in range(5)}
    write_tiny(tmp_path)
    write_shards(tmp_path, tensors | norms)
    assert Checkpoint.open(tmp_path).scales_dtype == torch.float16


def write_matrix(path, bits=4, group_size=32, columns=128, rows=8, quantization=None, **changes):
    """A checkpoint of one matrix ``lm_head``; ``changes`` replace or (None) remove its tensors."""
    weight, scales, biases = reference.quantize(torch.randn(rows, columns), group_size, bits)
    tensors = {"weight": weight, "scales": scales, "biases": biases} | changes
    named = {f"lm_head.{key}": value for key, value in tensors.items() if value is not None}
    write_json(path / "config.json", {"model_type": "llama", "quantization": quantization})
    write_shards(path, named | {"model.norm.weight": torch.ones(columns)})
    return Checkpoint.open(path)


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_shapes_decide(tmp_path, bits, group_size, caplog):
    checkpoint = write_matrix(
        tmp_path, bits, group_size, quantization={"bits": 4, "group_size": 32}
    )
    with caplog.at_level(logging.WARNING):
        assert checkpoint.quant_params("lm_head", 128) == QuantParams(bits, group_size)
        checkpoint.quant_params("lm_head", 128)
    if (bits, group_size) == (4, 32):
        assert not caplog.records
    else:  # the default is known to be wrong in real configs, so it is a warning, and only one
        assert len(caplog.records) == 1
        assert f"{bits} bits, group size {group_size}" in caplog.text


def test_shapes_without_any_config(tmp_path, caplog):
    checkpoint = write_matrix(tmp_path, 3, 64)
    assert checkpoint.quant_params("lm_head", 128) == QuantParams(3, 64)
    assert not caplog.records


def test_config_settles_shapes_that_allow_several_answers(tmp_path):
    checkpoint = write_matrix(tmp_path, 8, 32, quantization={"bits": 8, "group_size": 32})
    assert checkpoint.quant_params("lm_head") == QuantParams(8, 32)
    checkpoint = write_matrix(
        tmp_path, 4, 64
    )  # could be 8 bits in groups of 32, with half the columns
    refusal(lambda: checkpoint.quant_params("lm_head"), "lm_head.weight", "several")
    assert write_matrix(tmp_path, 5, 32).quant_params("lm_head") == QuantParams(5, 32)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, 64), (8, 128)])
def test_explicit_entry(tmp_path, bits, group_size):
    entry = {"bits": 2, "group_size": 64, "lm_head": {"bits": bits, "group_size": group_size}}
    checkpoint = write_matrix(tmp_path, bits, group_size, quantization=entry)
    assert checkpoint.quant_params("lm_head", 128) == QuantParams(bits, group_size)
    assert checkpoint.quant_params("lm_head") == QuantParams(bits, group_size)


ENTRY = {"bits": 4, "group_size": 32}
PACKED_FAULTS = {
    "explicit entry disagrees": (
        {"quantization": ENTRY | {"lm_head": {"bits": 6, "group_size": 32}}},
        ["lm_head.weight", "6 bits, group size 32", "[8, 16]"],
    ),
    "explicit entry disagrees only by K": (
        {"bits": 4, "group_size": 64, "quantization": {"lm_head": {"bits": 8, "group_size": 32}}},
        ["lm_head.weight", "8 bits, group size 32", "128 input features"],
    ),
    "entry is false": ({"quantization": ENTRY | {"lm_head": False}}, ["lm_head", "not quantized"]),
    "scales are missing": ({"scales": None}, ["lm_head.scales"]),
    "biases are missing": ({"biases": None}, ["lm_head.biases"]),
    "weight is missing": ({"weight": None}, ["lm_head.weight"]),
    "entry for a dense weight": (
        {
            "quantization": ENTRY | {"lm_head": ENTRY},
            "weight": torch.zeros(8, 128),
            "scales": None,
            "biases": None,
        },
        ["lm_head.scales", "4 bits, group size 32"],
    ),
    "fp mode": (
        {"scales": torch.zeros(8, 4, dtype=torch.uint8), "biases": None},
        ["lm_head.scales", "mxfp4"],
    ),
    "weight is no integer": (
        {"weight": torch.zeros(8, 16)},
        ["lm_head.weight", "F32 [8, 16]", "U32"],
    ),
    "scales are integers": (
        {"scales": torch.zeros(8, 4, dtype=torch.int64)},
        ["lm_head.scales", "I64"],
    ),
    "biases are doubles": (
        {"biases": torch.zeros(8, 4, dtype=torch.float64)},
        ["lm_head.biases", "F64"],
    ),
    "scales and biases differ": (
        {"biases": torch.zeros(8, 4).half()},
        ["lm_head.biases", "F16", "F32"],
    ),
    "too few rows of scales": (
        {"scales": torch.zeros(7, 4), "biases": torch.zeros(7, 4)},
        ["lm_head.scales", "[7, 4]", "[8, 16]"],
    ),
    "too few rows of biases": ({"biases": torch.zeros(7, 4)}, ["lm_head.biases", "[7, 4]"]),
    "no format has these groups": (
        {"scales": torch.zeros(8, 3), "biases": torch.zeros(8, 3)},
        ["lm_head.scales", "[8, 3]", "fits no"],
    ),
    "a stack of experts": (
        {"weight": torch.zeros(2, 8, 16, dtype=torch.int32)},
        ["lm_head.weight", "[2, 8, 16]", "matrices"],
    ),
    "no columns": ({"scales": torch.zeros(8, 0), "biases": torch.zeros(8, 0)}, ["[8, 0]"]),
}


@pytest.mark.parametrize(("changes", "words"), PACKED_FAULTS.values(), ids=PACKED_FAULTS.keys())
def test_packed_matrix_that_does_not_fit_together(tmp_path, changes, words):
    checkpoint = write_matrix(tmp_path, **changes)
    refusal(lambda: checkpoint.quant_params("lm_head", 128), *words)


def test_matrix_of_another_width(tmp_path):
    checkpoint = write_matrix(tmp_path)
    refusal(lambda: checkpoint.quant_params("lm_head", 512), "lm_head.weight", "512 input features")


def test_unknown_mode_of_the_config(tmp_path):
    write_tiny(tmp_path)
    edit_json(
        tmp_path / "config.json", quantization={"bits": 4, "group_size": 32, "mode": "spiral"}
    )
    refusal(lambda: Checkpoint.open(tmp_path), "'spiral'", "config.json", error=ConfigError)


def test_every_refusal_is_of_one_family():
    assert issubclass(CheckpointError, Q4MetalError)
    assert issubclass(ConfigError, Q4MetalError)


def shift_data(file, spaces):
    """Lengthen the header by some spaces, so that the data begins at an odd address."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    header += b" " * (-len(header) % 8 + spaces)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
