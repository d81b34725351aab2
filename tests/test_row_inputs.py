"""Inputs of a few rows that are filled in place, against those that torch works out."""

import pytest
import torch

from torch_q4metal.cache import KVPool, Sequence
from torch_q4metal.decode_plan import block_tables, places_of_rows
from torch_q4metal.models.rope import RopeConfig
from torch_q4metal.row_inputs import RopeRows, RowInputs

ROPES = {
    "default": RopeConfig(16, 64),
    "yarn": RopeConfig(16, 64, rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    "dynamic": RopeConfig(16, 64, rope_type="dynamic", factor=2.0),
}


@pytest.mark.parametrize("name", ROPES)
def test_every_position_has_what_torch_gives_it(name):
    """Also where dynamic RoPE turns by the length of the text, and after other shapes."""
    rope = ROPES[name]
    pool = KVPool(1, 1, 16, torch.float32, 1024)
    inputs = RowInputs(RopeRows(rope))
    texts = [Sequence(pool) for _ in range(3)]
    for sequence, length in zip(texts, (31, 60, 5), strict=True):
        sequence.append(range(length))
    for chosen, counts, length in [
        ([0], [1], 0), ([0, 1, 2], [1, 1, 1], 0), ([1], [8], 0), ([2], [3], 200),
        ([2, 1], [2, 6], 0), ([0], [1], 40),
    ]:  # fmt: skip
        cache = [texts[i] for i in chosen]
        for sequence, count in zip(cache, counts, strict=True):
            sequence.reserve(count)
        inputs.fill(cache, counts, length)
        positions, expected = places_of_rows(rope, cache, counts, length)
        assert torch.equal(inputs.positions, positions)
        assert torch.equal(inputs.rope, expected)
        tables = block_tables(cache, counts)
        for row, position in enumerate(positions.tolist()):
            used = position // 32 + 1
            assert torch.equal(inputs.tables[row, :used], tables[row, :used])
