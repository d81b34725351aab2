"""Models on MPS: one copy of the weights in few buffers, read into them or through staging."""

import contextlib
import logging

import pytest
import tiny
import torch
from sentence import assert_one_sentence

from torch_q4metal import device_check, device_weights
from torch_q4metal.checkpoint import Checkpoint
from torch_q4metal.device import resolve_device
from torch_q4metal.device_weights import DeviceWeights
from torch_q4metal.errors import CheckpointError, MemoryLimitError, Q4MetalError
from torch_q4metal.generation import generate_step
from torch_q4metal.models import load_model

MPS = torch.device("mps")


def storages(model):
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


def not_shared(storage):
    raise RuntimeError("storage is not backed by a shared (unified) MTLBuffer")


@pytest.fixture(params=["read", "staged: none in torch", "staged: not shared", "staged: too short"])
def way(request, monkeypatch):
    """How bytes come to the device: "read" to there by the host, or "staged" for want of a view."""
    if "none" in request.param:
        monkeypatch.delattr(torch._C, "_mps_host_alias_storage")
    elif "not shared" in request.param:
        monkeypatch.setattr(torch._C, "_mps_host_alias_storage", not_shared)
    elif "short" in request.param:
        short = torch.UntypedStorage(16)
        monkeypatch.setattr(torch._C, "_mps_host_alias_storage", lambda storage: short)
    return request.param.partition(":")[0]


@pytest.fixture
def read_sizes(monkeypatch):
    """Bytes of all reads of weight files, in order."""
    sizes, read_bytes = [], device_weights.read_bytes

    def noting(file, begin, view):
        sizes.append(len(view))
        read_bytes(file, begin, view)

    monkeypatch.setattr(device_weights, "read_bytes", noting)
    return sizes


def mapped_files():
    with open("/proc/self/maps") as maps:
        return maps.read()


def test_one_copy_in_one_buffer(tmp_path, mac, way, read_sizes, caplog):
    """Whatever the way: each byte is read once, and at most once more copied, by the device."""
    caplog.set_level(logging.INFO)  # a record that is kept keeps no buffer
    written = tiny.write_tiny(tmp_path / "model", shards=3, tied=False, attention_bias=True)
    before = mac.allocations(), mac.allocated_bytes(), mac.uploaded_bytes()
    model = load_model(written.path, device="mps")
    assert mac.allocations() - before[0] == 1
    size = sum(t.nbytes for t in written.tensors.values())
    added = mac.allocated_bytes() - before[1]
    assert size <= added < size + 256 * (len(written.tensors) + 1)
    assert torch.mps.driver_allocated_memory() == mac.allocated_bytes()
    assert sum(read_sizes) == size
    assert mac.uploaded_bytes() - before[2] == (0 if way == "read" else added)
    assert model.device.type == "mps"
    assert len(storages(model)) == 1
    assert model.checkpoint.mapped_bytes == 0
    assert str(tmp_path) not in mapped_files()
    state = model.state_dict()
    assert state.keys() == written.tensors.keys()
    for name, tensor in written.tensors.items():
        assert torch.equal(state[name].view(tensor.dtype).cpu(), tensor), name
    held = mac.allocated_bytes()
    del model, state
    assert mac.allocated_bytes() == held - added


@pytest.mark.parametrize(("largest", "staging"), [(30_000, 1000), (30_000, 10**9), (10**9, 4097)])
def test_buffers_and_staging_are_bounded(tmp_path, mac, largest, staging, way, read_sizes):
    checkpoint = Checkpoint.open(tiny.write_tiny(tmp_path / "model", dtype=torch.bfloat16).path)
    names = list(checkpoint.tensors)
    weights = DeviceWeights(checkpoint, names, MPS, largest=largest, staging=staging)
    sizes = [len(buffer) for buffer in weights.buffers]
    assert max(sizes) < largest
    assert len(sizes) <= -(-checkpoint.weight_bytes // (largest // 2)) + 1
    assert sum(read_sizes) == checkpoint.weight_bytes
    if way == "read":
        assert len(read_sizes) == len(names)
    else:
        assert max(read_sizes) <= staging
    for name in names:
        assert weights.tensor(name).data_ptr() % 256 == 0
        assert torch.equal(weights.tensor(name).cpu(), checkpoint.tensor(name)), name


def test_text_is_the_same_either_way(tmp_path, mac, way):
    path = tiny.write_tiny(tmp_path / "model", shards=2, tied=False).path
    own, theirs = (
        [token for token, _ in generate_step([5, 6, 7], model, max_tokens=9, logprobs=False)]
        for model in (load_model(path, torch.float32, device) for device in ("mps", "cpu"))
    )
    assert own == theirs
    assert len(set(own)) > 1


def test_the_device_has_finished_before_and_sees_it_afterwards(tmp_path, mac, monkeypatch):
    """Without either synchronize the stand-in tells so."""
    checkpoint = Checkpoint.open(tiny.write_tiny(tmp_path / "model").path)
    name = "model.norm.weight"
    with mac.working_late():
        torch.ones(4).to(MPS, non_blocking=True)  # is queued
        before = mac.waits()
        weights = DeviceWeights(checkpoint, [name], MPS)
        assert mac.waits() == before + 2
        assert torch.equal(weights.tensor(name).cpu(), checkpoint.tensor(name))
        monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
        weights = DeviceWeights(checkpoint, [name], MPS)
        assert not torch.equal(weights.tensor(name).cpu(), checkpoint.tensor(name))
        torch.ones(4).to(MPS, non_blocking=True)
        with pytest.raises(AssertionError, match="synchronize first"):
            DeviceWeights(checkpoint, [name], MPS)


def test_the_doctor_says_how(mac, way, monkeypatch):
    row = device_check.check_loading()
    assert row.ok
    assert ("straight into GPU memory" if way == "read" else "through staging") in row.text
    other = contextlib.nullcontext(memoryview(bytearray(1 << 16)))
    monkeypatch.setattr(device_check, "host_view", lambda buffer: other)
    row = device_check.check_loading()
    assert not row.ok
    assert "does not see" in row.text


def test_staging_is_64_mb(tmp_path, mac, monkeypatch):
    assert device_weights.STAGING_BYTES == 64 * 2**20
    options = {"vocab_size": 1 << 17, "hidden_size": 160, "bits": None, "layers": 1}
    path = tiny.write_tiny(tmp_path / "model", **options, tokenizer=False).path
    monkeypatch.delattr(torch._C, "_mps_host_alias_storage")
    model = load_model(path, device="mps")
    assert mac.allocated_bytes() > 64 * 2**20 >= mac.largest_upload()
    own, theirs = (m.model.embed_tokens.weight for m in (model, load_model(path)))
    assert torch.equal(own.cpu(), theirs)


def test_a_tensor_that_no_buffer_holds(tmp_path, mac):
    checkpoint = Checkpoint.open(tiny.write_tiny(tmp_path / "model").path)
    with pytest.raises(MemoryLimitError) as error:
        DeviceWeights(checkpoint, checkpoint.tensors, MPS, largest=4000)
    assert_one_sentence(error.value, "model.embed_tokens.weight", "device='cpu'")


def test_a_stage_reads_its_own_bytes(tmp_path, mac, way, read_sizes):
    path = tiny.write_tiny(tmp_path / "model", layers=4, tied=False).path
    before = mac.allocated_bytes()
    whole = load_model(path, device="mps")
    read_sizes.clear()
    stage = load_model(path, device="mps", layers=range(1, 2))
    assert mac.allocated_bytes() - before < 2 * whole.checkpoint.weight_bytes
    assert sum(read_sizes) == stage.checkpoint.weight_bytes < whole.checkpoint.weight_bytes / 3
    theirs = whole.state_dict()
    for name, tensor in stage.state_dict().items():
        assert torch.equal(tensor.cpu(), theirs[name].cpu()), name


def test_a_file_that_was_cut_is_an_error(tmp_path, mac, way):
    checkpoint = Checkpoint.open(tiny.write_tiny(tmp_path / "model").path)
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    before = mac.allocated_bytes()
    with pytest.raises(CheckpointError, match="became shorter"):
        DeviceWeights(checkpoint, checkpoint.tensors, MPS)
    torch.mps.synchronize()
    assert mac.allocated_bytes() == before


def test_memory_is_checked_before(tmp_path, mac, monkeypatch):
    path = tiny.write_tiny(tmp_path / "model").path
    monkeypatch.setattr(torch._C, "_mps_recommendedMaxMemory", lambda: 60_000_000)
    before = mac.allocations()
    with pytest.raises(MemoryLimitError) as error:
        load_model(path, device="mps")
    assert_one_sentence(error.value, "GB")
    assert mac.allocations() == before


def test_devices_that_are_not_there(tmp_path, monkeypatch):
    path = tiny.write_tiny(tmp_path / "model").path
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(Q4MetalError) as error:
        load_model(path, device="mps")
    assert_one_sentence(error.value, "'mps'", "device='cpu'")
    with pytest.raises(Q4MetalError) as error:
        load_model(path, device="cuda:1")
    assert_one_sentence(error.value, "'cuda:1'", "'cpu'")
    assert load_model(path, device="auto").device.type == "cpu"


def test_operators_may_not_move_to_the_cpu(tmp_path, mac, monkeypatch):
    path = tiny.write_tiny(tmp_path / "model").path
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    for device in ("mps", "auto", MPS):
        with pytest.raises(Q4MetalError) as error:
            load_model(path, device=device)
        assert_one_sentence(error.value, "PYTORCH_ENABLE_MPS_FALLBACK=1", "unset")
    load_model(path, device="cpu")
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "0")
    assert resolve_device("auto") == MPS
