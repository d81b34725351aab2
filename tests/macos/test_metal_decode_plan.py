"""decode_step on MPS tensors, on Linux, against the CPU's: plan, encoder, barriers, kernels.

The sink (tests/macos/standin/plan_sink.cpp) runs what no barrier separates last one first, and
fails where two of those dispatches touch the same memory, one of them writing.
"""

import pytest
import tiny
import torch

from torch_q4metal import decode, ops
from torch_q4metal.cache import Sequence
from torch_q4metal.decode_mps import MetalDecodePlan
from torch_q4metal.decode_plan import block_tables
from torch_q4metal.models import load_model

BOUND = 2e-5  # of logits, relative to the largest: sums are float32 in both, in another order


class Texts:
    """Texts of a model that both plans decode further, each from its own keys and values."""

    def __init__(self, path, texts, room=1, **options):
        self.model = model = load_model(path, **options)
        self.pool = model.make_pool(len(texts) * (max(map(len, texts)) + room + 32))
        self.rows = [Sequence(self.pool) for _ in texts]
        for row, text in zip(self.rows, texts):
            row.reserve(len(text) + room)
        with torch.inference_mode():
            for slab in self.pool.slabs:
                slab.zero_()  # so that they can be compared as a whole
            for row, text in zip(self.rows, texts):
                if text:
                    model(torch.tensor([text]), [row])
        self.on_mps = load_model(path, device="mps", **options)
        self.cpu, self.mps = decode.DecodePlan(model), MetalDecodePlan(self.on_mps)
        self.slabs = [slab.to("mps") for slab in self.pool.slabs]

    def arguments(self):
        """ids, positions, rope and block tables of the next token of each row."""
        places = [row.length for row in self.rows]
        rope = [torch.stack(self.model.config.rope.rows(p, 1, p + 1), 1) for p in places]
        ids = torch.randint(self.model.config.vocab_size, (len(places),))
        tables = block_tables(self.rows, [1] * len(places))
        return ids, torch.tensor(places), torch.cat(rope), tables

    def step_on_mps(self, arguments, out, sampling=None):
        ids, positions, rope, tables = arguments
        torch.ops.q4metal.decode_step(
            self.mps.native.handle, ids.to("mps"), positions, rope.to("mps"), tables.to("mps"),
            sampling, self.slabs, out,
        )  # fmt: skip
        return out

    def step_on_cpu(self, arguments):
        logits = torch.empty(len(self.rows), self.model.config.vocab_size)
        ops.decode_step(self.cpu.native.handle, *arguments, self.pool.slabs, logits)
        return logits

    def logits_on_mps(self, arguments):
        shape = len(self.rows), self.model.config.vocab_size
        return self.step_on_mps(arguments, torch.full(shape, torch.nan).to("mps")).cpu()


def tiny_texts(path, lengths, **options):
    tiny.write_tiny(path, **options)
    size = tiny.VOCAB_SIZE
    texts = [torch.randint(size, (n,)).tolist() for n in lengths]
    return Texts(path, texts, precision="exact")


def assert_close(actual, expected, bound=BOUND):
    assert ((actual - expected).abs().max() / expected.abs().max()).item() < bound


SOME_DENSE = {"model.layers.1.self_attn.k_proj": False, "model.layers.0.mlp.down_proj": False}
MODELS = {
    "one row": ([40], {}),
    "three rows, biases, an empty text": ([33, 0, 70], {"attention_bias": True, "tied": False}),
    "eight rows": ([5, 31, 32, 63, 1, 2, 3, 4], {"family": "qwen2"}),
    "dense matrices, 16 bits": ([33, 7], {"overrides": SOME_DENSE, "dtype": torch.float16}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_cache_equal_the_cpu(tmp_path, mac, name):
    lengths, options = MODELS[name]
    texts = tiny_texts(tmp_path / "model", lengths, **options)
    arguments = texts.arguments()
    assert_close(texts.logits_on_mps(arguments), texts.step_on_cpu(arguments))
    bound = 2**-9 if texts.pool.dtype == torch.float16 else BOUND
    for own, theirs in zip(texts.slabs, texts.pool.slabs, strict=True):
        assert_close(own.cpu().float(), theirs.float(), bound)


def test_check_build_finds_nothing(tmp_path, mac):
    """Every access of every kernel, and every barrier, byte by byte."""
    mac.mode = "check"
    options = {"bits": 8, "group_size": 64, "dtype": torch.bfloat16}
    texts = tiny_texts(tmp_path / "model", [33, 2], **options)
    arguments = texts.arguments()
    assert_close(texts.logits_on_mps(arguments), texts.step_on_cpu(arguments), 5e-3)


def test_long_contexts_are_split_and_joined(tmp_path, mac):
    options = {"config": {"max_position_embeddings": 2048}}
    texts = tiny_texts(tmp_path / "model", [1200, 20], **options)
    arguments = texts.arguments()
    before = mac.plan_statistics()
    assert_close(texts.logits_on_mps(arguments), texts.step_on_cpu(arguments))
    submissions, dispatches, _ = (a - b for a, b in zip(mac.plan_statistics(), before))
    layers = texts.model.config.num_hidden_layers
    assert (submissions, dispatches) == (1, 6 * layers + 2)  # no argmax


def test_tokens_stay_on_the_device(tmp_path, mac):
    """Greedy ids: 5 L + 3 dispatches in one submission, nothing allocated, nothing waited for."""
    texts = tiny_texts(tmp_path / "model", [33, 2])
    arguments = texts.arguments()
    tokens = torch.full((5,), -1).to("mps")
    texts.step_on_mps(arguments, tokens[2:4])  # in the middle of a buffer
    assert tokens.cpu()[[0, 1, 4]].tolist() == [-1] * 3
    tokens = tokens[2:4]
    logits = texts.step_on_cpu(arguments)
    assert torch.equal(tokens.cpu(), logits.argmax(-1))

    ids, positions, rope, tables = arguments
    rope, tables, tokens = rope.to("mps"), tables.to("mps"), ids.to("mps")
    counts = mac.plan_statistics(), mac.allocations(), len(mac.fallbacks())
    torch.ops.q4metal.decode_step(  # the ids that it reads and those that it writes are one tensor
        texts.mps.native.handle, tokens, positions, rope, tables, None, texts.slabs, tokens
    )
    assert mac.allocations() == counts[1]
    assert len(mac.fallbacks()) == counts[2]
    done = [a - b for a, b in zip(mac.plan_statistics(), counts[0])]
    assert done[:2] == [1, 5 * texts.model.config.num_hidden_layers + 3]
    assert torch.equal(tokens.cpu(), logits.argmax(-1))


def test_sampling_at_a_temperature_of_zero_is_greedy(tmp_path, mac):
    texts = tiny_texts(tmp_path / "model", [33, 2])
    arguments = texts.arguments()
    sampling = torch.zeros(2, 6, dtype=torch.int32)
    tokens = texts.step_on_mps(arguments, torch.empty(2, dtype=torch.int64).to("mps"), sampling)
    assert torch.equal(tokens.cpu(), texts.step_on_cpu(arguments).argmax(-1))


def test_errors_name_what_is_wrong(tmp_path, mac):
    texts = tiny_texts(tmp_path / "model", [3])
    ids, positions, rope, tables = texts.arguments()
    tokens = torch.empty(1, dtype=torch.int64).to("mps")
    step, run = torch.ops.q4metal.decode_step, texts.step_on_mps
    rest = (positions, rope.to("mps"), tables.to("mps"), None, texts.slabs, tokens)
    cases = [
        (lambda: step(7, ids.to("mps"), *rest), "decode plan 7 does not exist on MPS"),
        (lambda: step(texts.cpu.native.handle, ids.to("mps"), *rest), "does not exist on MPS"),
        (lambda: run((ids.repeat(9), positions, rope, tables), tokens), "1 to 8 rows"),
        (lambda: run((ids.int(), positions, rope, tables), tokens), "input is Int"),
        (lambda: run((ids, positions.to("mps"), rope, tables), tokens), "positions is .* on mps"),
        (lambda: run((ids, positions + 10**6, rope, tables), tokens), "positions holds 1000003"),
        (lambda: run((ids, positions + 40, rope, tables), tokens), "position 43 needs 2 blocks"),
        (lambda: run((ids, positions, rope[:, :1], tables), tokens), "rope is Float"),
        (lambda: run((ids, positions, rope, tables[0]), tokens), "block_tables has shape"),
        (lambda: run((ids, positions, rope, tables), tokens[:0]), "out is Long"),
    ]
    for call, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            call()
    texts.mps.native.release()
    with pytest.raises(ValueError, match="its model was freed"):
        run((ids, positions, rope, tables), tokens)
