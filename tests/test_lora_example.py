"""examples/lora.py: adapters learn on a packed model whose weights do not change."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import write_tiny

from torch_q4metal import Q4Linear

EXAMPLE = Path(__file__).parents[1] / "examples" / "lora.py"


@pytest.fixture(scope="module")
def lora():
    spec = importlib.util.spec_from_file_location("lora", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_falls_and_packed_weights_stay(tmp_path, lora, dtype):
    written = write_tiny(tmp_path, "qwen2", dtype=dtype)
    model = lora.load(tmp_path)
    ids = torch.tensor([list(b"a quiet green harbour")])
    losses = lora.train(model, ids, steps=25)
    assert losses[-1] < 0.75 * losses[0]
    state = model.state_dict()
    for name, expected in written.tensors.items():
        name = name.replace("q_proj.", "q_proj.base.").replace("v_proj.", "v_proj.base.")
        tensor = state[name]
        assert torch.equal(tensor.view(expected.dtype), expected), name
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"a", "b"}
    assert len(trained) == 8  # 2 adapters of 2 matrices in each of 2 layers


def test_adapter_begins_as_the_layer_itself(lora):
    layer = Q4Linear.from_linear(torch.nn.Linear(64, 32), group_size=32)
    x = torch.randn(3, 64)
    assert torch.equal(lora.Lora(layer)(x), layer(x))


def test_command_line(tmp_path):
    write_tiny(tmp_path)
    command = [sys.executable, str(EXAMPLE), str(tmp_path), "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("loss") == 2
