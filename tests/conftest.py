"""Shared settings: the same random tensors and examples in every run, and no network."""

import os

import pytest

# Before torch is imported: OpenMP's idle workers would spin on the cores that others need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub must say so

import hypothesis
import torch

hypothesis.settings.register_profile(
    "tests", derandomize=True, deadline=None, max_examples=40, database=None
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
