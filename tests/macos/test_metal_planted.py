"""Bugs planted in the commands of a decode plan, as a slip in the encoder would make them: each is
found by the executor, or by a result that is not the CPU's. tests/long plants them in its text."""

import pytest
import tiny
import torch
from test_metal_decode_plan import BOUND, Texts

# The dispatches of a model of one layer, in order: where buffers and their neighbours are swapped.
DISPATCHES = {
    "embed": [0, 1, 4],
    "qkv": [0, 1, 4, 8, 11, 12, 13, 14, 15, 16],
    "attention": [0, 1, 2, 3],
    "output": [0, 1, 4],
    "gate and up": [0, 1, 8, 9],
    "down": [0, 1, 4],
    "head": [0, 1, 4, 5],
    "argmax": [0],
}
PLANTED = {
    **{f"no barrier {i}": ("no barrier", i) for i in range(7)},
    **{
        f"{name}: buffers {i} and {i + 1} swapped": ("buffers swapped", number, i)
        for number, (name, indices) in enumerate(DISPATCHES.items())
        for i in indices
    },
    **{
        f"{name}: arguments swapped": ("arguments swapped", number)
        for number, name in enumerate(DISPATCHES)
        if name not in ("output", "argmax")  # equal ones, and one only
    },
    **{f"{name}: grid cut": ("grid cut", number) for number, name in enumerate(DISPATCHES)},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write_tiny(tmp_path_factory.mktemp("m") / "m", layers=1, attention_bias=True).path


@pytest.fixture
def texts(path, mac):
    mac.mode = "check"
    return Texts(path, [[5, 6, 7], [9] * 33], precision="exact")


def compare(texts, arguments):
    """Tokens, keys and values are those of the CPU."""
    tokens = texts.step_on_mps(arguments, torch.full((2,), -1).to("mps"))
    expected = texts.step_on_cpu(arguments)
    logits = texts.logits_on_mps(arguments)
    error = (logits - expected).abs().max() / expected.abs().max()
    assert error < BOUND, f"logits are wrong by {float(error):.2g}"
    found = tokens.cpu().tolist()
    assert found == expected.argmax(-1).tolist(), f"tokens {found} are wrong"
    for own, theirs in zip(texts.slabs, texts.pool.slabs, strict=True):
        error = (own.cpu() - theirs).abs().max() / theirs.abs().max()
        assert error < BOUND, f"keys and values are wrong by {float(error):.2g}"


def test_without_a_bug_nothing_is_found(texts):
    compare(texts, texts.arguments())


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(texts, mac, planted, name):
    arguments = texts.arguments()
    with (
        pytest.raises((RuntimeError, AssertionError)) as found,
        mac.planted(*PLANTED[name]),
    ):
        compare(texts, arguments)
    planted(f"encoder: {name}", found.value)
