"""What these tests import lies beside them; and a Mac, as far as it can be had."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def mac(monkeypatch):
    """A machine where torch finds a Metal GPU, by the stand-in; nothing of ours leaves it."""
    import standin_build

    standin = standin_build.load()
    standin.mode = "typed"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    yield standin
    standin.mode = "typed"
    assert not [name for name in standin.fallbacks() if name.startswith("q4metal::")]
