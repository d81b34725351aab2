"""KVPool, Sequence and Window: any history of calls equals a plain list of tokens."""

import gc

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sentence import assert_one_sentence

from torch_q4metal import cache
from torch_q4metal.cache import BLOCK, KVPool, Sequence, Window
from torch_q4metal.errors import ContextLengthError

LAYERS, HEADS, DIM = 2, 2, 4


def make_pool(max_tokens=10_000, dtype=torch.float32):
    return KVPool(LAYERS, HEADS, DIM, dtype, max_tokens)


def keys_values(layer, tokens):
    """[2, tokens, heads, dim]: numbers that tell token, head, layer, and keys from values."""
    base = torch.tensor(tokens, dtype=torch.float32).view(1, -1, 1, 1)
    kind = torch.tensor([0.25, 0.5]).view(2, 1, 1, 1)
    head = torch.arange(HEADS).view(1, 1, -1, 1) / 64
    return base + 10_000 * layer + kind + head + torch.arange(DIM) / 1024


def write(sequence, tokens, commit=True):
    """One pass of new tokens; checks that each layer then sees all tokens, in order."""
    window = Window(sequence, len(tokens))
    history = sequence.tokens + tokens
    for layer in range(LAYERS):
        keys, values = window.update(layer, keys_values(layer, tokens))
        expected = keys_values(layer, history).transpose(1, 2)  # [2, heads, tokens, dim]
        assert torch.equal(keys[0], expected[0])
        assert torch.equal(values[0], expected[1])
    if commit:
        sequence.append(tokens)


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch):
    monkeypatch.setattr(cache, "SLAB_BLOCKS", 3)  # so that texts cross slabs


class Histories(RuleBasedStateMachine):
    """Up to four texts in a pool of twelve blocks."""

    @initialize(max_tokens=st.sampled_from([12 * BLOCK, 12 * BLOCK - 7]))
    def begin(self, max_tokens):
        self.slab_blocks, cache.SLAB_BLOCKS = cache.SLAB_BLOCKS, 3
        self.pool = make_pool(max_tokens)
        self.texts = [([], Sequence(self.pool))]
        self.next_token = 0

    def teardown(self):
        if hasattr(self, "slab_blocks"):
            cache.SLAB_BLOCKS = self.slab_blocks

    def new_tokens(self, count):
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    @rule(pick=st.integers(0, 3), count=st.integers(1, 80), commit=st.booleans())
    def append(self, pick, count, commit):
        text, sequence = self.texts[pick % len(self.texts)]
        tokens = self.new_tokens(count)
        if count > sequence.room:
            before = list(sequence.block_table), self.pool.free_blocks
            with pytest.raises(ContextLengthError):
                Window(sequence, count)
            assert before == (sequence.block_table, self.pool.free_blocks)
            return
        write(sequence, tokens, commit)  # not committed: as if interrupted
        if commit:
            text.extend(tokens)

    @rule(pick=st.integers(0, 3), share=st.floats(0, 1))
    def truncate(self, pick, share):
        text, sequence = self.texts[pick % len(self.texts)]
        length = int(len(text) * share)
        sequence.truncate(length)
        del text[length:]

    @rule(pick=st.integers(0, 3))
    def fork(self, pick):
        if len(self.texts) < 4:
            text, sequence = self.texts[pick % len(self.texts)]
            self.texts.append((list(text), sequence.fork()))

    @rule(pick=st.integers(0, 3))
    def free(self, pick):
        index = pick % len(self.texts)
        self.texts[index][1].free()
        if index:
            del self.texts[index]
        else:
            self.texts[0][0].clear()

    @rule(pick=st.integers(0, 3))
    def drop(self, pick):
        """A sequence that nobody holds any more gives its blocks back."""
        index = pick % len(self.texts)
        if index:
            del self.texts[index]

    @rule(pick=st.integers(0, 3))
    def fill(self, pick):
        """``room`` is exact."""
        text, sequence = self.texts[pick % len(self.texts)]
        room = sequence.room
        with pytest.raises(ContextLengthError):
            sequence.reserve(room + 1)
        if room:
            tokens = self.new_tokens(room)
            write(sequence, tokens)
            text.extend(tokens)
        assert sequence.room == 0

    @invariant()
    def sequences_equal_their_lists(self):
        if not hasattr(self, "texts"):
            return
        for text, sequence in self.texts:
            assert sequence.tokens == text
            assert sequence.length == len(text)
            for position, token in enumerate(text):
                block = sequence.block_table[position // BLOCK]
                slab, row = self.pool.locate(block)
                stored = self.pool.slabs[slab][:, 1, row, :, position % BLOCK]
                assert float(stored[0, 0, 0]) == token + 10_000.25

    @invariant()
    def blocks_are_counted(self):
        if not hasattr(self, "texts"):
            return
        held = {block for _, sequence in self.texts for block in sequence.block_table}
        assert self.pool.free_blocks == self.pool.max_blocks - len(held)
        assert len(self.pool.slabs) <= 4


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_slabs_have_the_documented_layout_and_never_move():
    pool = make_pool()
    sequence = Sequence(pool)
    write(sequence, list(range(40)))
    first = pool.slabs[0]
    address = first.data_ptr()
    assert first.shape == (2, LAYERS, 3, HEADS, BLOCK, DIM)
    write(sequence, list(range(40, 400)))
    assert len(pool.slabs) == 5
    assert pool.slabs[0] is first
    assert first.data_ptr() == address
    # Token 37 lies in the second block, at place 5: its value in layer 1, head 1.
    expected = keys_values(1, [37])[1, 0, 1]
    assert torch.equal(first[1, 1, sequence.block_table[1], 1, 5], expected)


def test_memory_is_allocated_slab_by_slab_and_counted():
    pool = make_pool(100)
    assert pool.slabs == []
    assert pool.bytes_per_token == LAYERS * 2 * HEADS * DIM * 4
    Sequence(pool).append([1])
    assert len(pool.slabs) == 1
    sequence = Sequence(pool)
    sequence.append(range(64))
    # 100 positions are four blocks; the second slab has the fourth alone.
    sequence.append(range(36))
    assert [slab.shape[2] for slab in pool.slabs] == [3, 1]


def test_a_fork_shares_blocks_until_one_side_writes():
    pool = make_pool()
    sequence = Sequence(pool)
    write(sequence, list(range(70)))
    other = sequence.fork()
    assert other.block_table == sequence.block_table
    assert pool.free_blocks == pool.max_blocks - 3
    write(other, [900])
    assert other.block_table[:2] == sequence.block_table[:2]
    assert other.block_table[2] != sequence.block_table[2]
    write(sequence, [901])
    assert sequence.tokens[-1] == 901
    assert other.tokens[-1] == 900
    sequence.free()
    write(other, [902])
    assert pool.free_blocks == pool.max_blocks - 3


def test_keys_are_rounded_to_the_pool_s_dtype():
    pool = make_pool(dtype=torch.bfloat16)
    new = torch.randn(2, 3, HEADS, DIM)
    keys, values = Window(Sequence(pool), 3).update(0, new)
    assert keys.dtype == values.dtype == torch.float32
    rounded = new.bfloat16().float().transpose(1, 2)
    assert torch.equal(keys[0], rounded[0])
    assert torch.equal(values[0], rounded[1])


def test_scattered_blocks_are_gathered_in_order():
    pool = make_pool()
    sequences = [Sequence(pool) for _ in range(3)]
    for turn in range(6):  # block by block in turns, so that no two of a text adjoin
        for i, sequence in enumerate(sequences):
            write(sequence, [1000 * i + 32 * turn + j for j in range(32)])
    assert sequences[0].block_table == [0, 3, 6, 9, 12, 15]
    sequences[1].free()
    write(sequences[0], list(range(90)))  # takes the holes, which lie before and behind


def test_blocks_that_only_seem_to_adjoin(monkeypatch):
    """0, 2, 1, 3: first and last are as far apart as in a run, but it is none."""
    monkeypatch.setattr(cache, "SLAB_BLOCKS", 4)
    pool = make_pool()
    single = [Sequence(pool) for _ in range(4)]
    for sequence in single:
        sequence.append([0])
    for i in (3, 1, 2, 0):
        single[i].free()
    sequence = Sequence(pool)
    write(sequence, list(range(100)))
    assert sequence.block_table == [0, 2, 1, 3]


def test_a_fork_has_no_part_in_blocks_that_are_only_reserved():
    pool = make_pool()
    sequence = Sequence(pool)
    write(sequence, list(range(64)))
    write(sequence, [700, 701], commit=False)
    other = sequence.fork()
    assert other.block_table == sequence.block_table[:2]
    write(sequence, [900])
    write(other, [901])
    write(sequence, [902])


def test_a_slab_made_under_inference_mode_can_be_used_outside():
    pool = make_pool()
    with torch.inference_mode():
        write(Sequence(pool), [1, 2])
    write(Sequence(pool), [3, 4])


def test_errors():
    sequence = Sequence(make_pool(40))
    with pytest.raises(ContextLengthError) as error:
        sequence.append(range(41))
    assert_one_sentence(error.value, "40", "41", "max_kv_size")
    assert sequence.block_table == []
    with pytest.raises(ValueError, match="cannot truncate 0 tokens to 1"):
        sequence.truncate(1)
    with pytest.raises(ContextLengthError) as error:
        make_pool(0)
    assert_one_sentence(error.value, "0")


def test_a_dropped_sequence_gives_its_blocks_back():
    pool = make_pool(64)
    sequence = Sequence(pool)
    sequence.append(range(64))
    assert pool.free_blocks == 0
    del sequence
    gc.collect()
    assert pool.free_blocks == 2
