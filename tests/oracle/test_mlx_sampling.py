"""Filters and penalty against mlx-lm's own."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm import sample_utils

from torch_q4metal import sampling


def distributions():
    generator = torch.Generator().manual_seed(5)
    for size in (8, 700, 5000):
        for spread in (0.3, 3.0, 12.0):
            logits = torch.randn(size, generator=generator) * spread
            yield torch.log_softmax(logits, -1)
    ties = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.5, 0.5, -1.0, 2.0])
    yield torch.log_softmax(ties, -1)


def apply_mlx(function, logprobs, *arguments):
    return torch.from_numpy(np.array(function(mx.array(logprobs.numpy())[None], *arguments)))[0]


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.8, 0.95, 0.999])
def test_top_p(top_p):
    for logprobs in distributions():
        expected = apply_mlx(sample_utils.apply_top_p, logprobs, top_p)
        result = sampling.apply_top_p(logprobs, top_p)
        differ = (result != expected).nonzero().flatten().tolist()
        # MLX adds up in f32: a token or two may differ, on the very edge.
        assert len(differ) <= 2
        mass = logprobs.double().exp()
        above = [float(mass[logprobs > logprobs[i]].sum() / mass.sum()) for i in differ]
        assert above == pytest.approx([top_p] * len(differ), abs=5e-6)


@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5, 1.0])
def test_min_p(min_p):
    for logprobs in distributions():
        expected = apply_mlx(sample_utils.apply_min_p, logprobs, min_p)
        assert torch.equal(sampling.apply_min_p(logprobs, min_p), expected)


@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_top_k(top_k):
    for logprobs in list(distributions())[:-1]:  # of equal tokens either may stay
        expected = apply_mlx(sample_utils.apply_top_k, logprobs, top_k)
        assert torch.equal(sampling.apply_top_k(logprobs, top_k), expected)


@pytest.mark.parametrize("window", [1, 5, 20])
def test_repetition_penalty(window):
    (ours,) = sampling.make_logits_processors(1.3, window)
    (theirs,) = sample_utils.make_logits_processors(
        repetition_penalty=1.3, repetition_context_size=window
    )
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3]
    logits = torch.randn(12)
    before = logits.clone()
    expected = np.array(theirs(mx.array(tokens), mx.array(logits.numpy())[None]))[0]
    torch.testing.assert_close(ours(tokens, logits), torch.from_numpy(expected))
    assert torch.equal(logits, before)
