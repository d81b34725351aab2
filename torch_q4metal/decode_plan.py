"""The decode plan of a model: one call a token instead of some thousand.

Decoding with modules costs a Python call for every operation. A plan is built once from the
model's tensors, which stay where they are, and then computes the next logits of up to 8 rows in one
operator, ``torch.ops.q4metal.decode_step``. On the CPU it reads prompts too, a chunk a call, in
less time and memory than modules. The modules remain the definition: tests compare them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as List
from typing import Any

import torch
from torch import Tensor, nn

from . import _extension, ops
from .cache import Sequence
from .linear import PackedModule, Q4Embedding, Q4Linear
from .models.base import MATVEC_ROWS, PREFILL_CHUNK, CausalLM
from .models.rope import RopeConfig
from .row_inputs import RopeRows, RowInputs

_native = _extension.load()
NATIVE_DTYPES = {
    torch.float32: _native.DType.float32,
    torch.float16: _native.DType.float16,
    torch.bfloat16: _native.DType.bfloat16,
}


class DecodePlan:
    """Computes the next tokens' logits of up to 8 rows of ``model``.

    It refers to the model's tensors, so it needs no memory but a workspace. After weights were
    replaced (not changed in place) it has to be built anew. This one computes on the CPU.
    """

    def __init__(self, model: CausalLM) -> None:
        """Raises ValueError, naming the matrix, where shapes do not fit; see ``is_supported``."""
        config = model.config
        self._rope = config.rope
        self._rope_rows = RopeRows(config.rope)
        self._inputs: list[RowInputs] = []  # free ones: threads may decode at once
        self._width = config.vocab_size if model.part.has_head else config.hidden_size
        self._kept: list[Tensor] = []  # what the plan's addresses point into
        decoder: Any = model.model
        shape = _native.Shape(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            layers=len(decoder.layers),
            norm_eps=config.rms_norm_eps,
            attention_scale=config.head_dim**-0.5,
            kv_dtype=NATIVE_DTYPES[model.kv_dtype],
            precision=getattr(_native.Precision, min(precisions(model), default="fast")),
        )
        table = self._segment(decoder.embed_tokens) if model.part.has_table else None
        layers = [self._layer(block) for block in decoder.layers]
        head = None
        if model.part.has_head:
            matrix = table if config.tied else self._segment(model.lm_head)
            head = _native.Head(self._floats(decoder.norm.weight), matrix)
        embedding = table if model.part.embeds else None
        self.native = self._build(shape, embedding, layers, head, model.max_kv_size)

    def __del__(self) -> None:
        # Passes that other threads have under way read the weights: they end before those go.
        if native := self.__dict__.get("native"):
            native.release()

    def describe(self) -> str:
        """A line a step: kind, matrices, bytes, buffers read and written; and the barriers."""
        return self.native.describe()

    def forward(self, ids: List[List[int]], cache: List[Sequence]) -> Tensor:
        """Logits [B, vocab_size] f32 after the last of ids [B][L], B * L at most 8 in all.

        The tokens are appended to their sequences, which must be different ones. Raises
        ContextLengthError, before anything is computed, if a sequence has no room.
        """
        counts = [len(tokens) for tokens in ids]
        logits = torch.empty(sum(counts), self._width)
        self._append(ids, cache, counts, logits)
        return last_rows(logits, counts)

    def likeliest(self, ids: List[List[int]], cache: List[Sequence]) -> list[int]:
        """As ``forward``, but gives the likeliest next token of each sequence, of equals the first.

        Nothing is left for Python to do with 150,000 logits, which takes 0.3 ms right after a pass.
        """
        counts = [len(tokens) for tokens in ids]
        chosen = self._append(ids, cache, counts)
        if len(chosen) == len(counts):
            return chosen
        return [chosen[end - 1] for end in itertools.accumulate(counts)]

    def _append(
        self,
        ids: List[List[int]],
        cache: List[Sequence],
        counts: List[int],
        logits: Tensor | None = None,
    ) -> list[int]:
        """Puts ids [B][L] into their sequences, with ``logits`` [R, V] for all of them if given.

        Returns the likeliest token after each of the R ids if not.
        """
        for sequence, count in zip(cache, counts, strict=True):
            sequence.reserve(count)
        inputs = self._free_inputs()
        inputs.fill(cache, counts)
        inputs.write_ids(ids)
        out = inputs.next_ids if logits is None else logits
        self.run(inputs.ids, inputs, cache[0].pool.slabs, out)
        chosen = inputs.read_next_ids() if logits is None else []
        self._inputs.append(inputs)
        for tokens, sequence in zip(ids, cache):
            sequence.append(tokens)
        return chosen

    @property
    def reads_prompts(self) -> bool:
        """Whether ``prefill`` is faster than modules: it is not where layers were left dense."""
        return self.native.has_packed_layers

    def prefill(self, ids: List[int], sequence: Sequence) -> Tensor:
        """Logits [1, vocab_size] f32 after the last of ids, any number of them.

        They go through in the chunks of ``PREFILL_CHUNK``; each is in the sequence as a whole or
        not at all, whatever interrupts. Raises ContextLengthError, before anything is computed, if
        the sequence has no room.
        """
        sequence.reserve(len(ids))
        length, done = sequence.length + len(ids), 0
        while True:
            chunk = ids[done : done + PREFILL_CHUNK - sequence.length % PREFILL_CHUNK]
            done += len(chunk)
            rows = len(chunk) if len(chunk) <= MATVEC_ROWS else int(done == len(ids))
            logits = torch.empty(rows, self._width)
            self.advance(torch.tensor(chunk), [sequence], [len(chunk)], logits, length)
            sequence.append(chunk)
            if done == len(ids):
                return logits[-1:]

    def advance(
        self,
        x: Tensor,
        cache: List[Sequence],
        counts: List[int],
        out: Tensor | None = None,
        length: int = 0,
    ) -> Tensor:
        """What the plan makes of so many rows for each sequence, R in all: of ids [R], or residual
        rows [R, hidden_size] f32 if it does not embed. More than 8 rows are one sequence's.

        Returns logits [R, vocab_size] f32, or residual rows if it has no head, in ``out`` if that
        is given; of more than 8 rows, only the last len(out). The sequences have room for their
        rows, and do not count them yet. ``length``: positions of the text once all chunks of its
        prompt are done, if it is longer than these rows make it.
        """
        if out is None:
            out = torch.empty(len(x), self._width)
        slabs = cache[0].pool.slabs
        if len(x) <= MATVEC_ROWS:
            inputs = self._free_inputs()
            inputs.fill(cache, counts, length)
            self.run(x, inputs, slabs, out)
            self._inputs.append(inputs)
            return out
        positions, rope = places_of_rows(self._rope, cache, counts, length)
        tables = block_tables(cache, counts)
        ops.decode_step(self.native.handle, x, positions, rope, tables, slabs, out)
        return out

    def _free_inputs(self) -> RowInputs:
        try:
            return self._inputs.pop()
        except IndexError:  # asked instead of looked up: another thread may take the last
            return self.row_inputs()

    def row_inputs(self) -> RowInputs:
        """What ``run`` takes, to be filled."""
        return RowInputs(self._rope_rows)

    def run(self, x: Tensor, inputs: RowInputs, slabs: list[Tensor], out: Tensor) -> None:
        """``advance`` of up to 8 rows whose places are ``inputs`` already."""
        ops.decode_step(
            self.native.handle, x, inputs.positions, inputs.rope, inputs.tables, slabs, out
        )

    def _build(self, *parts: Any) -> Any:
        return _native.DecodePlan(*parts)

    def _layer(self, block: Any) -> Any:
        attention, mlp = block.self_attn, block.mlp
        return _native.Layer(
            input_norm=self._floats(block.input_layernorm.weight),
            q=self._segment(attention.q_proj),
            k=self._segment(attention.k_proj),
            v=self._segment(attention.v_proj),
            output=self._segment(attention.o_proj),
            post_norm=self._floats(block.post_attention_layernorm.weight),
            gate=self._segment(mlp.gate_proj),
            up=self._segment(mlp.up_proj),
            down=self._segment(mlp.down_proj),
        )

    def _segment(self, layer: nn.Module) -> Any:
        own_bias = getattr(layer, "bias", None)
        bias = 0 if own_bias is None else self._floats(own_bias)
        if isinstance(layer, Q4Linear | Q4Embedding):
            dtype = torch.promote_types(layer.scales.dtype, layer.biases.dtype)
            rows, groups = layer.scales.shape
            return _native.packed_segment(
                weight=self._address(layer.weight),
                scales=self._address(layer.scales.to(dtype)),
                biases=self._address(layer.biases.to(dtype)),
                scales_dtype=NATIVE_DTYPES[dtype],
                out_features=rows,
                in_features=groups * layer.group_size,
                group_size=layer.group_size,
                bits=layer.bits,
                bias=bias,
            )
        weight: Any = layer.weight
        return _native.dense_segment(
            weight=self._address(weight),
            dtype=NATIVE_DTYPES[weight.dtype],
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            bias=bias,
        )

    def _floats(self, tensor: Tensor) -> int:
        return self._address(tensor.float())

    def _address(self, tensor: Tensor) -> int:
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1].data_ptr()


def precisions(model: CausalLM) -> set[str]:
    """Those of the packed layers."""
    return {str(m.precision) for m in model.modules() if isinstance(m, PackedModule)}


def last_rows(rows: Tensor, counts: List[int]) -> Tensor:
    """The last row of each sequence, of rows [R, ...] that come so many a sequence."""
    if len(rows) == len(counts):
        return rows
    return rows[torch.tensor(counts).cumsum(0) - 1]


def places_of_rows(
    rope: RopeConfig, cache: List[Sequence], counts: List[int], length: int = 0
) -> tuple[Tensor, Tensor]:
    """Positions int64 [R] of the next so many rows of each sequence, and their cosines and signed
    sines f32 [R, 2, head_dim]. ``length`` as for ``DecodePlan.advance``.
    """
    places = [range(s.length, s.length + count) for s, count in zip(cache, counts)]
    positions = torch.tensor([position for place in places for position in place])
    rows = [
        torch.stack(rope.rows(place.start, len(place), max(place.stop, length)), 1)
        for place in places
    ]
    return positions, torch.cat(rows)


def block_tables(cache: List[Sequence], counts: List[int]) -> Tensor:
    """int32 [rows, blocks]: each row's blocks in the order of positions, zeros behind them."""
    longest = max(len(sequence.block_table) for sequence in cache)
    tables = torch.tensor(
        [s.block_table + [0] * (longest - len(s.block_table)) for s in cache], dtype=torch.int32
    )
    return tables.repeat_interleave(torch.tensor(counts), 0)
