"""RoPE: the formulas element by element, and every setting that is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence import assert_one_sentence

from torch_q4metal.errors import ConfigError
from torch_q4metal.models.rope import RopeConfig, rotate

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


def read(raw, head_dim=64, longest=4096, theta=10000.0):
    return RopeConfig.from_raw(
        raw, head_dim=head_dim, max_position_embeddings=longest, default_theta=theta
    )


def test_default_frequencies_and_where_theta_comes_from():
    expected = [500.0 ** (-2 * i / 64) for i in range(32)]
    for raw in (
        {"rope_theta": 500.0},
        {"rope_theta": 500, "rope_scaling": None},
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 7.0},
        {"rope_parameters": {"full_attention": {"rope_theta": 500.0}}},
    ):
        torch.testing.assert_close(read(raw).inverse_frequencies(10).tolist(), expected)
    assert read({}, theta=1e6).rope_theta == 1e6


def test_llama3_by_its_three_cases():
    rope = read({"rope_scaling": LLAMA3})
    seen = set()
    for i, value in enumerate(rope.inverse_frequencies(1).tolist()):
        plain = 10000.0 ** (-2 * i / 64)
        wavelength = 2 * math.pi / plain
        if wavelength < 64 / 4:
            seen.add("short")
            expected = plain
        elif wavelength > 64 / 1:
            seen.add("long")
            expected = plain / 8
        else:
            seen.add("between")
            smooth = (64 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * plain / 8 + smooth * plain
        assert value == pytest.approx(expected, rel=1e-12)
    assert seen == {"short", "long", "between"}


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_by_its_ramp(truncate):
    rope = read({"rope_scaling": YARN | {"truncate": truncate}})

    def index(turns):
        return 64 * math.log(2048 / (turns * 2 * math.pi)) / (2 * math.log(10000.0))

    low, high = index(32), index(1)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    for i, value in enumerate(rope.inverse_frequencies(1).tolist()):
        plain = 10000.0 ** (-2 * i / 64)
        ramp = min(max((i - low) / (high - low), 0), 1)
        assert value == pytest.approx(plain / 4 * ramp + plain * (1 - ramp), rel=1e-12)
    assert rope.scaling == pytest.approx(0.1 * math.log(4) + 1)


def test_yarn_scaling():
    def scaling(**settings):
        return read({"rope_scaling": YARN | settings}).scaling

    usual = 0.1 * math.log(4) + 1
    assert scaling(attention_factor=0.5) == 0.5
    assert scaling(mscale=2.0) == pytest.approx(usual)
    assert scaling(mscale=1.0, mscale_all_dim=0) == pytest.approx(usual)
    assert scaling(mscale=2.0, mscale_all_dim=1.0) == pytest.approx((0.2 * math.log(4) + 1) / usual)
    assert scaling(factor=0.5) == 1.0
    assert read({"rope_scaling": LLAMA3}).scaling == 1.0


def test_dynamic_grows_with_the_text_only_beyond_the_trained_length():
    rope = read({"rope_scaling": {"type": "dynamic", "factor": 3.0}}, longest=100)
    plain = read({}).inverse_frequencies(1)
    assert torch.equal(rope.inverse_frequencies(5), plain)
    assert torch.equal(rope.inverse_frequencies(100), plain)
    base = 10000.0 * (3.0 * 250 / 100 - 2.0) ** (64 / 62)
    expected = [base ** (-2 * i / 64) for i in range(32)]
    torch.testing.assert_close(rope.inverse_frequencies(250).tolist(), expected)


def test_linear():
    rope = read({"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert torch.equal(rope.inverse_frequencies(1), read({}).inverse_frequencies(1) / 4)


@given(
    start=st.integers(0, 100_000),
    count=st.integers(1, 5),
    half=st.sampled_from([1, 3, 18, 32]),
)
def test_rotation_is_a_complex_product(start, count, half):
    rope = read({}, head_dim=2 * half)
    cos, sin = rope.rows(start, count, start + count)
    assert cos.shape == sin.shape == (count, 2 * half)
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.randn(count, 3, 2 * half)
    turned = rotate(x, cos.unsqueeze(1), sin.unsqueeze(1))
    angles = torch.outer(
        torch.arange(start, start + count, dtype=torch.float64), rope.inverse_frequencies(1)
    )
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    expected = pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    expected = torch.cat((expected.real, expected.imag), -1).float()
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-6)


def test_scores_depend_on_distance_alone():
    rope = read({"rope_scaling": LLAMA3}, head_dim=16)
    query, key = torch.randn(2, 1, 1, 16, dtype=torch.float64).unbind(0)

    def score(i, j):
        turned = [
            rotate(x, *(row.double().unsqueeze(1) for row in rope.rows(p, 1, p + 1)))
            for x, p in ((query, i), (key, j))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-5)
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-3)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"rope_scaling": {"type": "longrope", "short_factor": [1]}}, ["longrope", "yarn"]),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, ["mrope"]),
        ({"rope_parameters": {"rope_type": "proportional"}}, ["proportional"]),
        ({"rope_scaling": {"type": ["yarn"]}}, ["['yarn']"]),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, ["mrope_section"]),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, ["two types"]),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ["factor", "0"]),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, ["factor", "'4'"]),
        ({"rope_scaling": {"type": "linear", "factor": True}}, ["factor", "True"]),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, ["factor", "inf"]),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, ["low_freq_factor"]),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, ["high_freq_factor 4"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["original_max_position_embeddings"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling", "'yarn'"]),
        ({"rope_parameters": [1]}, ["rope_parameters", "[1]"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        ({"rope_theta": -1.0}, ["rope_theta", "-1"]),
        ({"rope_theta": 1.0}, ["rope_theta", "above 1"]),
        (
            {"rope_parameters": {"full_attention": LLAMA3, "sliding_attention": YARN}},
            ["full_attention, sliding_attention"],
        ),
        ({"rope_parameters": {"full_attention": LLAMA3, "rope_theta": 1e4}}, ["differ"]),
    ],
)
def test_what_is_not_built_or_wrong_is_named(raw, words):
    with pytest.raises(ConfigError) as error:
        read(raw)
    assert_one_sentence(error.value, "config.json", *words)


def test_odd_head_dim_is_refused():
    for head_dim, raw in ((9, {}), (2, {"rope_scaling": {"type": "dynamic", "factor": 2.0}})):
        with pytest.raises(ConfigError, match=f"head_dim is {head_dim}"):
            read(raw, head_dim=head_dim)


def test_rope_parameters_win_over_rope_scaling_and_say_so(caplog):
    both = {"rope_parameters": LLAMA3, "rope_scaling": YARN}
    assert read(both).rope_type == "llama3"
    assert "rope_scaling is ignored" in caplog.text
    caplog.clear()
    same = {"rope_parameters": LLAMA3 | {"rope_theta": 5.0}, "rope_scaling": LLAMA3}
    assert read(same).rope_theta == 5.0
    assert not caplog.text


def test_outer_original_length_and_remarks_are_read():
    rope = read(
        {
            "original_max_position_embeddings": 512,
            "rope_scaling": {"type": "yarn", "factor": 2.0, "finetuned": True},
        }
    )
    assert rope.original_max_position_embeddings == 512
