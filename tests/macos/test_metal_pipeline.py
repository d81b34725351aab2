"""A pipeline whose stages are on MPS: what travels between them is on the CPU."""

import itertools
import sys
from pathlib import Path

import pytest
import tiny
import torch

from torch_q4metal import mac_kernels
from torch_q4metal.generation import generate_step
from torch_q4metal.models import load_model
from torch_q4metal.pipeline import handshake

sys.path.append(str(Path(__file__).parent.parent / "pipeline"))

from ring import threads_ring


@pytest.mark.parametrize("eager", [False, True])
def test_stages_on_mps_write_the_text_of_one_process(tmp_path, mac, eager):
    path = tiny.write_tiny(tmp_path / "model", layers=3, tied=False).path
    prompt = torch.randint(256, (40,)).tolist()
    expected = [token for token, _ in generate_step(prompt, load_model(path), max_tokens=8)]
    before = mac.plan_statistics()[0]
    with threads_ring(path, [range(1), range(1, 3)], device="mps", eager=eager) as model:
        steps = list(itertools.islice(generate_step(prompt, model), 8))
    assert [token for token, _ in steps] == expected
    assert (mac.plan_statistics()[0] == before) == eager


def test_a_rank_on_mps_is_measured_there(mac, monkeypatch):
    handshake.read_speed.cache_clear()
    monkeypatch.setattr(mac_kernels, "COLD_BYTES", 1 << 16)
    monkeypatch.setattr(handshake, "available_memory", lambda: 1)
    monkeypatch.setattr(handshake, "available_on_mps", lambda: 2)
    before = len(mac.dispatches())
    info = handshake.describe(0, "auto", "auto")
    assert {name for name, *_ in mac.dispatches()[before:]} == {"read_probe"}
    assert info.speed > 0
    assert info.memory == 2
    assert handshake.describe(0, "memory", "cpu").memory == 1
    handshake.read_speed.cache_clear()
