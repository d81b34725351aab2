"""Models on MPS: one copy of the weights in few buffers, through a small staging buffer."""

import pytest
import tiny
import torch
from sentence import assert_one_sentence

from torch_q4metal import device_weights
from torch_q4metal.checkpoint import Checkpoint
from torch_q4metal.device import resolve_device
from torch_q4metal.device_weights import DeviceWeights
from torch_q4metal.errors import MemoryLimitError, Q4MetalError
from torch_q4metal.models import load_model

MPS = torch.device("mps")


def storages(model):
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


def mapped_files():
    with open("/proc/self/maps") as maps:
        return maps.read()


def test_one_copy_in_one_buffer(tmp_path, mac):
    written = tiny.write_tiny(tmp_path / "model", shards=3, tied=False, attention_bias=True)
    before = mac.allocations(), mac.allocated_bytes()
    model = load_model(written.path, device="mps")
    assert mac.allocations() - before[0] == 1
    size = sum(t.nbytes for t in written.tensors.values())
    added = mac.allocated_bytes() - before[1]
    assert size <= added < size + 256 * (len(written.tensors) + 1)
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
def test_buffers_and_staging_are_bounded(tmp_path, mac, largest, staging, monkeypatch):
    checkpoint = Checkpoint.open(tiny.write_tiny(tmp_path / "model", dtype=torch.bfloat16).path)
    copied = []
    fill = device_weights._fill
    monkeypatch.setattr(
        device_weights, "_fill", lambda *a: copied.append(len(a[2])) or fill(*a)
    )  # bytes of the memory that is staged
    names = list(checkpoint.tensors)
    weights = DeviceWeights(checkpoint, names, MPS, largest=largest, staging=staging)
    assert set(copied) <= {min(staging, max(map(len, weights.buffers)))}
    sizes = [len(buffer) for buffer in weights.buffers]
    assert max(sizes) < largest
    assert len(sizes) <= -(-checkpoint.weight_bytes // (largest // 2)) + 1
    for name in names:
        assert weights.tensor(name).data_ptr() % 256 == 0
        assert torch.equal(weights.tensor(name).cpu(), checkpoint.tensor(name)), name


def test_staging_is_64_mb(tmp_path, mac):
    assert device_weights.STAGING_BYTES == 64 * 2**20
    options = {"vocab_size": 1 << 17, "hidden_size": 160, "bits": None, "layers": 1}
    path = tiny.write_tiny(tmp_path / "model", **options, tokenizer=False).path
    model = load_model(path, device="mps")
    assert mac.allocated_bytes() > 64 * 2**20 >= mac.largest_upload()
    own, theirs = (m.model.embed_tokens.weight for m in (model, load_model(path)))
    assert torch.equal(own.cpu(), theirs)


def test_a_tensor_that_no_buffer_holds(tmp_path, mac):
    checkpoint = Checkpoint.open(tiny.write_tiny(tmp_path / "model").path)
    with pytest.raises(MemoryLimitError) as error:
        DeviceWeights(checkpoint, checkpoint.tensors, MPS, largest=4000)
    assert_one_sentence(error.value, "model.embed_tokens.weight", "device='cpu'")


def test_a_stage_reads_its_own_bytes(tmp_path, mac):
    path = tiny.write_tiny(tmp_path / "model", layers=4, tied=False).path
    before = mac.allocated_bytes()
    whole, stage = (load_model(path, device="mps", layers=r) for r in (None, range(1, 2)))
    assert mac.allocated_bytes() - before < 2 * whole.checkpoint.weight_bytes
    assert stage.checkpoint.weight_bytes < whole.checkpoint.weight_bytes / 3
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(stage.state_dict()[name].cpu(), whole.state_dict()[name].cpu())


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
