"""Text from a model on MPS: load_model(device="mps") and generate, against the CPU."""

import pytest
import tiny
import torch

from torch_q4metal.builtin_model import builtin_model
from torch_q4metal.generation import generate_step
from torch_q4metal.models import base, load_model
from torch_q4metal.tokenizer import Tokenizer

BOUND = 2e-5  # of logits, relative to the largest: float32 in both, summed in another order


def on_both(path, **options):
    return [load_model(path, torch.float32, device, **options) for device in ("cpu", "mps")]


def ids_of(model, prompt, count, **options):
    return [token for token, _ in generate_step(prompt, model, max_tokens=count, **options)]


def assert_close(actual, expected, bound=BOUND):
    assert ((actual.cpu() - expected).abs().max() / expected.abs().max()).item() < bound


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_modules_read_prompts(tmp_path, mac, monkeypatch, family):
    """In chunks, of several texts."""
    monkeypatch.setattr(base, "PREFILL_CHUNK", 16)
    path = tiny.write_tiny(tmp_path / "model", family, overrides={"lm_head": False}, tied=False)
    ids = torch.randint(tiny.VOCAB_SIZE, (2, 37))
    results = []
    for model in on_both(path.path):
        caches = [model.make_cache(64), model.make_cache(64)]
        model(ids[:, :5], caches)
        logits = model(ids[:, 5:], caches, logits_to_keep=3)
        slabs = [cache.pool.slabs[0][:, :, :1] for cache in caches]
        results.append((logits, *slabs))
        assert [cache.tokens for cache in caches] == ids.tolist()
    for expected, actual in zip(*results, strict=True):
        assert actual.device.type == "mps"
        assert_close(actual, expected)


def test_smollm2_writes_the_same_text(mac):
    """16 greedy tokens, all in float32."""
    path = builtin_model()
    prompt = Tokenizer.from_dir(path).encode("The capital of France is")
    expected, actual = (ids_of(model, prompt, 16) for model in on_both(path))
    assert actual == expected
    assert len(set(expected)) > 4
