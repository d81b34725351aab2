"""Models on MPS: one copy of the weights in few buffers, by safetensors or through staging."""

import gc
import json
import logging

import pytest
import safetensors
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
from torch_q4metal.safetensors_header import read_header

MPS = torch.device("mps")


def storages(model):
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


@pytest.fixture(params=["whole shards", "padded shards"])
def model_of(request, tmp_path):
    """Writes a tiny model, which safetensors reads, or refuses for its gaps between tensors."""

    def write(**options):
        written = tiny.write_tiny(tmp_path / "model", **options)
        if request.param == "padded shards":
            for file in written.path.glob("*.safetensors"):
                put_gaps(file)
        return written

    write.is_staged = request.param == "padded shards"
    return write


def put_gaps(file):
    """Eight bytes before each tensor."""
    content = file.read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data])
    for number, info in enumerate(read_header(file).values(), 1):
        header[info.name]["data_offsets"] = [offset - data + 8 * number
                                             for offset in (info.begin, info.end)]  # fmt: skip
    body = b"".join(bytes(8) + content[i.begin : i.end] for i in read_header(file).values())
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)


class Shard:
    """What ``safe_open`` gives on a Mac, where nothing waits for the GPU; it notes each reading."""

    def __init__(self, reads, file, framework, *, device, backend):
        assert (framework, device, backend) == ("pt", "mps", "pread")
        self.opened = safetensors.safe_open(file, framework, device="cpu", backend=backend)
        self.keys, self.reads = self.opened.keys, reads

    def get_tensor(self, name):
        return self.on_device(self.opened.get_tensor(name))

    def get_slice(self, name):
        return Slice(self, self.opened.get_slice(name))

    def on_device(self, tensor):
        self.reads.append(tensor.nbytes)
        return tensor.to(MPS, non_blocking=True)


class Slice:
    def __init__(self, shard, rows):
        self.shard, self.rows = shard, rows

    def __getitem__(self, rows):
        return self.shard.on_device(self.rows[rows])


@pytest.fixture
def reads(monkeypatch):
    """Bytes of all that is read by safetensors for the device, and by ourselves."""
    reads = {"safetensors": [], "staging": []}
    read_bytes = device_weights.read_bytes

    def noting(file, begin, view):
        reads["staging"].append(len(view))
        read_bytes(file, begin, view)

    def opening(*arguments, **options):
        return Shard(reads["safetensors"], *arguments, **options)

    monkeypatch.setattr(device_weights, "read_bytes", noting)
    monkeypatch.setattr(device_weights, "safe_open", opening)
    return reads


def mapped_files():
    with open("/proc/self/maps") as maps:
        return maps.read()


def test_one_copy_in_one_buffer(mac, model_of, caplog):
    """Whatever the way: what is left is one buffer, and nothing of the files is mapped."""
    caplog.set_level(logging.INFO)  # a record that is kept keeps no buffer
    written = model_of(shards=3, tied=False, attention_bias=True)
    gc.collect()  # models of tests before this one
    before = mac.allocations(), mac.allocated_bytes()
    model = load_model(written.path, device="mps")
    temporary = 0 if model_of.is_staged else len(written.tensors)
    assert mac.allocations() - before[0] == 1 + temporary
    size = sum(t.nbytes for t in written.tensors.values())
    added = mac.allocated_bytes() - before[1]
    assert size <= added < size + 256 * (len(written.tensors) + 1)
    assert torch.mps.driver_allocated_memory() == mac.allocated_bytes()
    assert model.device.type == "mps"
    assert len(storages(model)) == 1
    assert model.checkpoint.mapped_bytes == 0
    assert str(written.path) not in mapped_files()
    state = model.state_dict()
    assert state.keys() == written.tensors.keys()
    for name, tensor in written.tensors.items():
        assert torch.equal(state[name].view(tensor.dtype).cpu(), tensor), name
    held = mac.allocated_bytes()
    del model, state
    assert mac.allocated_bytes() == held - added


@pytest.mark.parametrize(("largest", "staging"), [(30_000, 5000), (30_000, 10**9), (10**9, 9001)])
def test_buffers_and_what_is_on_the_way_are_bounded(mac, model_of, largest, staging, reads):
    """Each byte is read once; while the GPU is late, at most ``staging`` are not in their place."""
    checkpoint = Checkpoint.open(model_of(dtype=torch.bfloat16).path)
    before = mac.allocated_bytes()
    mac.most_bytes()
    with mac.working_late():
        weights = DeviceWeights(checkpoint.tensors, MPS, largest=largest, staging=staging)
    sizes = [len(buffer) for buffer in weights.buffers]
    most = mac.most_bytes() - before - sum(sizes)
    assert max(sizes) < largest
    assert len(sizes) <= -(-checkpoint.weight_bytes // (largest // 2)) + 1
    way, other = ("staging", "safetensors") if model_of.is_staged else ("safetensors", "staging")
    assert sum(reads[way]) == checkpoint.weight_bytes
    assert not reads[other]
    assert max(reads[way]) <= staging
    assert most <= (0 if model_of.is_staged else staging)
    assert mac.allocated_bytes() - before == sum(sizes)
    for name in checkpoint.tensors:
        assert weights.tensor(name).data_ptr() % 256 == 0
        assert torch.equal(weights.tensor(name).cpu(), checkpoint.tensor(name)), name


def test_rows_that_are_larger_than_staging_pass_through_it(tmp_path, mac, reads):
    checkpoint = Checkpoint.open(tiny.write_tiny(tmp_path / "model", dtype=torch.bfloat16).path)
    weights = DeviceWeights(checkpoint.tensors, MPS, staging=20)
    assert not reads["safetensors"]
    assert max(reads["staging"]) == 20
    for name in checkpoint.tensors:
        assert torch.equal(weights.tensor(name).cpu(), checkpoint.tensor(name)), name


def test_text_is_the_same_either_way(mac, model_of):
    path = model_of(shards=2, tied=False).path
    own, theirs = (
        [token for token, _ in generate_step([5, 6, 7], model, max_tokens=9, logprobs=False)]
        for model in (load_model(path, torch.float32, device) for device in ("mps", "cpu"))
    )
    assert own == theirs
    assert len(set(own)) > 1


def test_the_doctor_loads_what_it_knows(mac, monkeypatch):
    row = device_check.check_loading()
    assert row.ok
    assert "whole files and parts" in row.text
    for part, text in (("_move", "a of a, b, c; b of a, b, c; c of a, b, c"), ("_stage", "b of b")):
        with monkeypatch.context() as broken:
            broken.setattr(device_weights, part, lambda *_: None)
            row = device_check.check_loading()
        assert not row.ok
        assert row.text == f"other bytes arrive on the GPU: {text}"


def test_at_most_64_mb_are_on_the_way(mac, model_of, reads):
    assert device_weights.STAGING_BYTES == 64 * 2**20
    options = {"vocab_size": 1 << 17, "hidden_size": 160, "bits": None, "layers": 1}
    path = model_of(**options, tokenizer=False).path
    before = mac.allocated_bytes()
    mac.most_bytes()
    model = load_model(path, device="mps")
    size = mac.allocated_bytes() - before
    assert size > 80e6
    assert mac.most_bytes() - before <= size + (0 if model_of.is_staged else 64 * 2**20)
    assert max(reads["staging" if model_of.is_staged else "safetensors"]) <= 64 * 2**20
    assert mac.largest_upload() <= 64 * 2**20
    own, theirs = (m.model.embed_tokens.weight for m in (model, load_model(path)))
    assert torch.equal(own.cpu(), theirs)


def test_a_tensor_that_no_buffer_holds(tmp_path, mac):
    checkpoint = Checkpoint.open(tiny.write_tiny(tmp_path / "model").path)
    with pytest.raises(MemoryLimitError) as error:
        DeviceWeights(checkpoint.tensors, MPS, largest=4000)
    assert_one_sentence(error.value, "model.embed_tokens.weight", "device='cpu'")


def test_a_stage_reads_its_own_bytes(tmp_path, mac, reads):
    """Of shards whose tensors it needs all, by safetensors; parts through staging."""
    path = tiny.write_tiny(tmp_path / "model", layers=4, tied=False, shards=8).path
    before = mac.allocated_bytes()
    whole = load_model(path, device="mps")
    assert sum(reads["safetensors"]) == whole.checkpoint.weight_bytes
    assert not reads["staging"]
    reads["safetensors"].clear()
    stage = load_model(path, device="mps", layers=range(1, 3))
    assert mac.allocated_bytes() - before < 2 * whole.checkpoint.weight_bytes
    needed = {info.name for info in stage.checkpoint.tensors.values()}
    shards = [read_header(file) for file in path.glob("*.safetensors")]
    complete = sum(i.nbytes for s in shards if s.keys() <= needed for i in s.values())
    assert sum(reads["safetensors"]) == complete > 0
    assert sum(reads["staging"]) == stage.checkpoint.weight_bytes - complete > 0
    theirs = whole.state_dict()
    for name, tensor in stage.state_dict().items():
        assert torch.equal(tensor.cpu(), theirs[name].cpu()), name


def test_a_file_that_was_cut_is_an_error(mac, model_of):
    checkpoint = Checkpoint.open(model_of().path)
    file = checkpoint.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    before = mac.allocated_bytes()
    with pytest.raises(CheckpointError, match="became shorter"):
        DeviceWeights(checkpoint.tensors, MPS)
    torch.mps.synchronize()
    assert mac.allocated_bytes() == before


def test_a_file_that_is_cut_meanwhile_is_an_error(tmp_path, mac, monkeypatch):
    checkpoint = Checkpoint.open(tiny.write_tiny(tmp_path / "model").path)
    file = checkpoint.path / "model.safetensors"

    def opening(*arguments, **options):
        shard = safetensors.safe_open(*arguments, **options)
        file.write_bytes(file.read_bytes()[:-1])
        return shard

    monkeypatch.setattr(device_weights, "safe_open", opening)
    before = mac.allocated_bytes()
    with pytest.raises(CheckpointError) as error:
        DeviceWeights(checkpoint.tensors, MPS)
    last = max(checkpoint.tensors.values(), key=lambda info: info.end)
    assert_one_sentence(error.value, last.name, str(file), "cannot be read")
    del error  # its traceback has the buffers
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
