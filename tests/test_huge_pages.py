"""Weights that are read into huge pages, on Linux: when, and that they are the file's."""

import sys

import pytest
import tiny
import torch

from torch_q4metal import huge_pages, mapped_file
from torch_q4metal.checkpoint import Checkpoint
from torch_q4metal.errors import CheckpointError
from torch_q4metal.models import load_model

GB = 1 << 30


@pytest.fixture
def setting(tmp_path):
    def write(text):
        path = tmp_path / "enabled"
        path.write_text(text)
        return path

    return write


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has pages of 16 KB and no such setting")
def test_where_they_are_worthwhile(setting, tmp_path, monkeypatch):
    asked = setting("always [madvise] never\n")
    assert huge_pages.are_worthwhile(GB, asked, available=2 * GB)
    assert not huge_pages.are_worthwhile(GB, asked, available=GB)  # so that the file can make way
    assert not huge_pages.are_worthwhile(1 << 20, asked, available=GB)
    assert not huge_pages.are_worthwhile(GB, setting("always madvise [never]\n"), 2 * GB)
    assert not huge_pages.are_worthwhile(GB, tmp_path / "missing", 2 * GB)
    monkeypatch.setenv("Q4METAL_HUGE_PAGES", "0")
    assert not huge_pages.are_worthwhile(GB, asked, 2 * GB)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has pages of 16 KB and no such setting")
def test_tensors_are_the_files(tmp_path, monkeypatch):
    """Every tensor and the logits are the same bits, and no byte of the file is mapped."""
    tiny.write_tiny(tmp_path / "model", dtype=torch.float16, bits=4)
    mapped = load_model(tmp_path / "model")
    monkeypatch.setattr(mapped_file, "_PIECE", 1000)
    monkeypatch.setattr(huge_pages, "are_worthwhile", lambda size: True)
    read = load_model(tmp_path / "model")
    theirs = dict(mapped.state_dict())
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(read(ids, [read.make_cache(8)]), mapped(ids, [mapped.make_cache(8)]))
    assert read.checkpoint.mapped_bytes == 0 < mapped.checkpoint.mapped_bytes
    weight = read.model.layers[0].mlp.gate_proj.weight
    assert weight.data_ptr() % 64 == 0
    weight.data.zero_()  # private: the file keeps its bytes
    assert load_model(tmp_path / "model").model.layers[0].mlp.gate_proj.weight.any()


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has pages of 16 KB and no such setting")
def test_a_file_that_was_cut_is_an_error(tmp_path):
    tiny.write_tiny(tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="became shorter"):
        huge_pages.HugePageWeights(checkpoint, checkpoint.tensors)
