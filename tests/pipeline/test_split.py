"""Splits of layers: every layer once, within memory, and no better one exists."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_q4metal.errors import MemoryLimitError, Q4MetalError
from torch_q4metal.pipeline.split import Capacity, LayerCost, explicit_split, split_layers

costs = st.builds(LayerCost, st.integers(1, 20), st.integers(1, 20))
speeds = st.integers(1, 9)


def assert_covers(ranges, layers, stages):
    assert len(ranges) == stages
    assert [layer for part in ranges for layer in part] == list(range(layers))
    assert all(len(part) for part in ranges)


@given(st.lists(costs, min_size=1, max_size=60), st.data())
def test_ranges_cover_every_layer_once(layers, data):
    stages = data.draw(st.integers(1, len(layers)))
    capacities = [Capacity(data.draw(speeds), 1e9) for _ in range(stages)]
    assert_covers(split_layers(layers, capacities), len(layers), stages)


def every_split(layers, stages):
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        bounds = [0, *cuts, layers]
        yield [range(a, b) for a, b in itertools.pairwise(bounds)]


def judged(ranges, layers, capacities, first, last):
    """(time of the slowest stage, sum of squares), or None if a stage overflows."""
    times = []
    for i, (part, capacity) in enumerate(zip(ranges, capacities, strict=True)):
        held = [layers[layer] for layer in part]
        held += [first] * (i == 0) + [last] * (i == len(ranges) - 1)
        if sum(cost.memory for cost in held) > capacity.memory:
            return None
        times.append(sum(cost.work for cost in held) / capacity.speed)
    return max(times), sum(time * time for time in times)


@given(st.lists(costs, min_size=1, max_size=8), costs, costs, st.data())
def test_no_other_split_is_better(layers, first, last, data):
    stages = data.draw(st.integers(1, min(4, len(layers))))
    capacities = [
        Capacity(data.draw(speeds), data.draw(st.integers(10, 120))) for _ in range(stages)
    ]
    marks = [
        mark
        for ranges in every_split(len(layers), stages)
        if (mark := judged(ranges, layers, capacities, first, last)) is not None
    ]
    if not marks:
        with pytest.raises(MemoryLimitError, match="do not fit"):
            split_layers(layers, capacities, first=first, last=last)
        return
    ranges = split_layers(layers, capacities, first=first, last=last)
    assert judged(ranges, layers, capacities, first, last) == pytest.approx(min(marks))


def test_the_faster_stage_gets_more():
    layers = [LayerCost(1, 1)] * 28
    counts = [len(part) for part in split_layers(layers, [Capacity(1, 99), Capacity(3, 99)])]
    assert counts == [7, 21]
    assert [len(part) for part in split_layers(layers, [Capacity(1, 99)] * 3)] == [9, 9, 10]


def test_embedding_and_head_weigh_on_their_stages():
    layers = [LayerCost(1, 1)] * 10
    ranges = split_layers(layers, [Capacity(1, 99)] * 2, last=LayerCost(4, 4))
    assert [len(part) for part in ranges] == [7, 3]
    ranges = split_layers(layers, [Capacity(1, 6), Capacity(1, 99)], first=LayerCost(0, 4))
    assert [len(part) for part in ranges] == [2, 8]


def test_explicit_counts():
    assert explicit_split([10, 18], 28, 2) == [range(10), range(10, 28)]
    for counts, sentence in [
        ([28], "--split 28 is for 1 stages, but there are 2"),
        ([10, 17], "gives out 27 layers, but the model has 28"),
        ([0, 28], "each stage needs at least one"),
    ]:
        with pytest.raises(Q4MetalError, match=sentence):
            explicit_split(counts, 28, 2)


@pytest.mark.parametrize("split", [
    lambda: split_layers([LayerCost(1, 1)] * 2, [Capacity(1, 9)] * 3),
    lambda: explicit_split([1, 1, 0], 2, 3),
])  # fmt: skip
def test_more_stages_than_layers_is_told(split):
    with pytest.raises(Q4MetalError, match="3 stages are too many for a model of 2 layers"):
        split()


def test_a_stage_without_speed_is_told():
    with pytest.raises(Q4MetalError, match="stage 1 has a speed of 0"):
        split_layers([LayerCost(1, 1)] * 2, [Capacity(1, 9), Capacity(0, 9)])
