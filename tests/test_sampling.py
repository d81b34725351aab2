"""Sampling: settings, their order, and what seeds promise."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence import assert_one_sentence

from torch_q4metal import _extension, device_sampling
from torch_q4metal.errors import Q4MetalError
from torch_q4metal.sampling import (
    SamplingParams,
    apply_filters,
    apply_min_p,
    apply_top_k,
    apply_top_p,
    greedy,
    make_logits_processors,
    make_sampler,
)


def logprobs_of(*probabilities):
    return torch.tensor(probabilities).log()


def kept(logprobs):
    return {i for i, value in enumerate(logprobs.tolist()) if value > -math.inf}


def drawn(sampler, logprobs, times=300):
    return [sampler(logprobs) for _ in range(times)]


def draw_token(logits, *settings):
    return _extension.load().draw_token(logits.data_ptr(), len(logits), *settings)


def test_default_is_greedy_and_takes_the_first_of_equals():
    assert SamplingParams().sampler() is greedy
    assert make_sampler() is greedy
    assert greedy(logprobs_of(0.1, 0.4, 0.4, 0.1)) == 1
    assert SamplingParams().logits_processors() == []


def test_filters_are_of_untempered_probabilities():
    """At temperature 5 the distribution is almost flat: a tempered top-p would keep all four."""
    logprobs = logprobs_of(0.7, 0.2, 0.06, 0.04)
    assert set(drawn(make_sampler(5.0, 0.85), logprobs)) == {0, 1}
    assert set(drawn(make_sampler(5.0, min_p=0.08), logprobs)) == {0, 1, 2}
    assert set(drawn(make_sampler(5.0, top_k=3), logprobs)) == {0, 1, 2}
    assert set(drawn(make_sampler(5.0), logprobs)) == {0, 1, 2, 3}


def test_top_p_comes_before_top_k():
    """top_k first, renormalised, would make 0.6 of the mass out of token 0 alone."""
    logprobs = logprobs_of(0.4, 0.25, 0.2, 0.15)
    assert set(drawn(make_sampler(1.0, 0.6, top_k=3), logprobs)) == {0, 1}
    assert set(drawn(make_sampler(1.0, 0.7, top_k=2), logprobs)) == {0, 1}


def test_temperature_is_a_power_of_the_probabilities():
    logprobs = logprobs_of(0.5, 0.3, 0.2)
    for temperature in (0.5, 1.0, 2.0):
        expected = logprobs.exp() ** (1 / temperature)
        expected /= expected.sum()
        sampler = SamplingParams(temperature=temperature, seed=1).sampler()
        counts = torch.tensor(drawn(sampler, logprobs, 4000)).bincount(minlength=3) / 4000
        torch.testing.assert_close(counts, expected, rtol=0, atol=0.03)


def test_seeds():
    logprobs = torch.log_softmax(torch.randn(1000), -1)
    params = SamplingParams(temperature=1.0, seed=7)
    assert drawn(params.sampler(), logprobs) == drawn(params.sampler(), logprobs)
    other = SamplingParams(temperature=1.0, seed=8)
    assert drawn(params.sampler(), logprobs) != drawn(other.sampler(), logprobs)
    free = SamplingParams(temperature=1.0)
    assert drawn(free.sampler(), logprobs) != drawn(free.sampler(), logprobs)
    state = torch.get_rng_state()
    drawn(params.sampler(), logprobs, 3)
    assert torch.equal(torch.get_rng_state(), state)


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40),
    top_p=st.floats(0.001, 0.999),
)
def test_the_nucleus_is_the_smallest_that_reaches_top_p(logits, top_p):
    logprobs = torch.log_softmax(torch.tensor(logits), -1)
    result = apply_top_p(logprobs, top_p)
    stays = kept(result)
    assert stays
    assert all(float(result[i]) == float(logprobs[i]) for i in stays)
    lowest = min(float(logprobs[i]) for i in stays)
    assert stays == {i for i, value in enumerate(logprobs.tolist()) if value >= lowest}
    mass = logprobs.double().exp()
    above = float(mass[logprobs > lowest].sum() / mass.sum())
    assert above < top_p + 1e-5
    assert float(mass[logprobs >= lowest].sum() / mass.sum()) >= top_p - 1e-5


def test_a_nucleus_beyond_the_first_guess_is_found():
    logprobs = torch.log_softmax(torch.randn(5000) * 0.01, -1)
    assert 4400 < len(kept(apply_top_p(logprobs, 0.9))) < 4600


@given(
    logits=st.lists(st.sampled_from([-3.0, 0.0, 0.5, 0.5001, 2.0, 7.0]), min_size=1, max_size=40),
    top_p=st.sampled_from([0.0, 0.1, 0.7, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
    top_k=st.integers(0, 41),
)
def test_tokens_to_draw_from_are_what_the_filters_leave(logits, top_p, min_p, top_k):
    """Of log-probabilities and of logits; of equals at top_k's end, as many."""
    logits = torch.tensor(logits)
    logprobs = torch.log_softmax(logits, -1)
    expected = kept(apply_filters(logprobs, top_p, min_p, top_k))
    for values in (logits, logprobs):
        # So hot that all that are left are about as likely.
        ids = {draw_token(values, 1e3, top_p, min_p, top_k, i / 200) for i in range(200)}
        assert sorted(logits[list(ids)].tolist()) == sorted(logits[list(expected)].tolist())


@pytest.mark.parametrize("size", [1, 16, 255, 256, 257, 5000, 151_936])
@pytest.mark.parametrize("spread", [0.01, 2.0, 12.0])
@pytest.mark.parametrize(
    ("top_p", "min_p", "top_k"),
    [
        (0, 0, 0),
        (0.9, 0, 0),
        (0.95, 0.001, 0),
        (0.8, 0, 20),
        (0, 0, 300),
        (0, 0.02, 0),
        (1, 0.5, 9),
    ],
)
def test_a_number_draws_the_token_within_whose_share_it_lies(size, spread, top_p, min_p, top_k):
    """Also where the nucleus is nearly all of the vocabulary, and where it is one token."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * spread
    logits[size // 2 + 1 :: 7] = -math.inf
    logprobs = torch.log_softmax(logits, -1)
    for temperature in (0.3, 1.0):
        left = apply_filters(logprobs, top_p, min_p, top_k).double()
        ends = torch.softmax(left / temperature, -1).cumsum(0)
        for number in torch.rand(50, dtype=torch.float64, generator=torch.Generator()).tolist():
            token = draw_token(logits, temperature, top_p, min_p, top_k, number)
            begin = float(ends[token - 1]) if token else 0.0
            assert begin - 1e-5 <= number <= float(ends[token]) + 1e-5
            assert left[token] > -math.inf


def test_only_tokens_with_a_probability_are_drawn():
    nothing = torch.full((4,), -math.inf)
    masked = nothing.clone()
    masked[2] = -5.0
    assert set(drawn(make_sampler(1.0), masked)) == {2}
    for number in (0.0, 1 - 2**-53):
        assert draw_token(masked, 1.0, 0.0, 0.0, 0, number) == 2
        assert draw_token(torch.tensor([-math.inf] * 600 + [3.0]), 1e-300, 0, 0, 0, number) == 600
    samplers = make_sampler(1.0), make_sampler(1.0, 0.9), make_sampler(1.0, min_p=0.1, top_k=2)
    for sampler in samplers:
        one = torch.tensor([1.0, math.nan, 2.0, 1.0])
        for logits in (nothing, torch.full((4,), math.nan), one):
            with pytest.raises(Q4MetalError) as error:
                sampler(logits)
            assert_one_sentence(error.value, "4 logits", "precision='exact'")


def test_min_p_and_top_k():
    logprobs = logprobs_of(0.5, 0.26, 0.24)
    assert kept(apply_min_p(logprobs, 0.5)) == {0, 1}
    assert kept(apply_min_p(logprobs, 1.0)) == {0}
    assert kept(apply_top_k(logprobs, 1)) == {0}
    assert kept(apply_top_k(logprobs, 2)) == {0, 1}
    assert torch.equal(apply_top_k(logprobs, 3), logprobs)
    assert torch.equal(apply_top_k(logprobs, 50), logprobs)


def test_repetition_penalty_divides_or_multiplies_once():
    (penalize,) = make_logits_processors(2.0, 3)
    logits = torch.tensor([4.0, -4.0, 4.0, 4.0])
    assert penalize([0, 1, 1, 2], logits).tolist() == [4.0, -8.0, 2.0, 4.0]
    assert penalize([], logits) is logits
    for penalty in (None, 0, 1, 1.0):
        assert make_logits_processors(penalty) == []
    assert make_logits_processors(2.0, 0) == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", -0.1, ["-0.1", "at least 0"]),
        ("temperature", math.nan, ["nan"]),
        ("temperature", math.inf, ["inf"]),
        ("top_p", 1.5, ["1.5", "between 0 and 1"]),
        ("min_p", -1, ["-1", "between 0 and 1"]),
        ("top_k", -5, ["-5", "at least 0"]),
        ("repetition_penalty", 0.0, ["0.0", "above 0"]),
        ("repetition_penalty", math.nan, ["nan"]),
        ("repetition_context_size", -1, ["-1"]),
    ],
)
def test_values_that_make_no_sense_are_named(name, value, words):
    with pytest.raises(Q4MetalError) as error:
        SamplingParams(**{name: value})
    assert_one_sentence(error.value, name, *words)


@pytest.mark.parametrize("size", [1, 300, 5000])
@pytest.mark.parametrize("spread", [0.5, 8.0])
@pytest.mark.parametrize("top_p", [0.0, 0.8])
@pytest.mark.parametrize("min_p", [0.0, 0.01])
@pytest.mark.parametrize("top_k", [0, 20])
def test_the_host_draws_what_a_device_draws(size, spread, top_p, min_p, top_k):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * spread
    logits[size // 2 + 1 :: 7] = -math.inf
    drawn = set()
    for temperature in (0.2, 1.0, 50.0):
        params = SamplingParams(temperature, top_p, top_k, min_p)
        for seed, position in ((5, 0), (-1, 77), (1 << 63, 1 << 33), (9, 4)):
            expected = device_sampling.draw(logits.log_softmax(-1), params, seed, position)
            assert device_sampling.sampler(params, seed, position)(logits) == expected
            drawn.add(expected)
    assert size == 1 or spread > 1 or len(drawn) > 1
    greedy_one = device_sampling.sampler(SamplingParams(), 5, 0)
    assert greedy_one(logits) == int(logits.argmax())
    with pytest.raises(Q4MetalError):
        device_sampling.sampler(params, 5, 0)(torch.full((4,), math.nan))
