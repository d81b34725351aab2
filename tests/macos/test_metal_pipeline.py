"""A pipeline whose stages are on MPS: what travels between them is on the CPU."""

import itertools
import sys
from pathlib import Path

import pytest
import tiny
import torch

from torch_q4metal.generation import generate_step
from torch_q4metal.models import load_model

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
