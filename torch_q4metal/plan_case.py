"""The decode plan of a small model on MPS: inputs and answers of each of its kernels.

Every step has memory of its own (csrc/plan/plan.h: isolate), so each kernel is seen alone, and all
of them run in one command buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _extension, device_sampling, known_answers
from .cache import BLOCK
from .decode_plan import NATIVE_DTYPES
from .known_answers import NORM_EPS, Answer, Matrix
from .models.base import MATVEC_ROWS
from .operator_case import SUMS
from .sampling import SamplingParams
from .small_model import SmallModel

POSITIONS = (700, 3, 133, 39, 73, 205, 17, 341)
"""Of rows. Different modulo 32: rows share the cache's blocks, and no two write one place."""
_BLOCKS = 2
LONG_CONTEXT = 1025
"""The shortest context that needs attention's kernels for long ones."""
_CACHE_STEPS = ("norm_qkv_rope_append", "attention")
_SAMPLING, _SEED = SamplingParams(temperature=0.8, top_k=20), (1 << 40) + 3
# Relative rms errors of what is kept in 16 bits.
_ROUNDED = {torch.float32: SUMS, torch.float16: 6e-4, torch.bfloat16: 5e-3}

_native = _extension.load()
_Buffer = tuple[str, int, int]  # name, offset in the workspace, bytes a row
_Take = Callable[[Tensor, Tensor], Tensor]  # of the workspace and the cache, both on the CPU


class PlanCase:
    """The plan of ``model`` for ``rows`` (1 to 8) tokens at once. Building it compiles nothing.

    ``plan_bytes``  on the device beside the model's tensors
    """

    def __init__(self, model: SmallModel, rows: int) -> None:
        self._model, self._formats, self._rows = model, model.formats, rows
        self._sizes, self._material = model.sizes, model.material
        self._kv_heads, self._heads = model.kv_heads, model.heads
        self._matrices, self._moved = model.matrices, model.moved
        self._gamma = self._material.uniform(model.sizes.hidden, 0.5, 1.5)
        self._memory = _native.DeviceMemory()
        self._plan = self._build_plan()
        self._steps = self._plan.steps(rows)
        self._make_inputs()

    @property
    def plan_bytes(self) -> int:
        logits = 4 * MATVEC_ROWS * self._sizes.vocabulary  # the plan's own
        return int(self._plan.workspace_bytes) + logits

    def prepare(self) -> None:
        """Works out the answers, and puts each step's inputs where it reads them."""
        self._answers = list(self._step_answers())
        self._there = torch.ops.q4metal.metal_workspace(self._plan.handle)
        self._there.copy_(self._workspace)

    def queue(self) -> None:
        """One pass, after ``prepare``."""
        torch.ops.q4metal.decode_step(self._plan.handle, *self._arguments)

    def results(self) -> list[tuple[Answer, Tensor]]:
        """Each answer with what the device gave, on the CPU."""
        after = self._there.cpu()
        cache = torch.cat([self._moved(slab).cpu() for slab in self._slabs], 2)
        return [(answer, take(after, cache)) for answer, take in self._answers]

    # ---- what the plan is made of

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        return int(self._memory.address(self._moved(tensor).untyped_storage().data_ptr(), 0))

    def _segment(self, matrix: Matrix) -> Any:
        form = matrix.format
        rows, columns = matrix.shape
        if form.bits == 0:
            return _native.dense_segment(
                weight=self._address(matrix.weight),
                dtype=NATIVE_DTYPES[form.dtype],
                out_features=rows,
                in_features=columns,
                bias=self._address(matrix.bias),
            )
        return _native.packed_segment(
            weight=self._address(matrix.weight),
            scales=self._address(matrix.scales),
            biases=self._address(matrix.biases),
            scales_dtype=NATIVE_DTYPES[form.dtype],
            out_features=rows,
            in_features=columns,
            group_size=form.group_size,
            bits=form.bits,
            bias=self._address(matrix.bias),
        )

    def _build_plan(self) -> Any:
        formats, sizes = self._formats, self._sizes
        shape = _native.Shape(
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            heads=self._heads,
            kv_heads=self._kv_heads,
            head_dim=formats.head_dim,
            vocab_size=sizes.vocabulary,
            layers=len(formats.layers),
            norm_eps=NORM_EPS,
            attention_scale=formats.head_dim**-0.5,
            kv_dtype=NATIVE_DTYPES[formats.kv_dtype],
            precision=_native.Precision.exact,
        )
        segments = {key: self._segment(matrix) for key, matrix in self._matrices.items()}
        gamma = self._address(self._gamma)
        layers = []
        for layer in formats.layers:
            parts = {name: segments[name, form] for name, form in vars(layer).items()}
            layers.append(_native.Layer(input_norm=gamma, post_norm=gamma, **parts))
        embedding = None if formats.table is None else segments["table", formats.table]
        head = None
        if formats.head is not None:
            head = _native.Head(gamma, segments["head", formats.head])
        context = LONG_CONTEXT if formats.context >= LONG_CONTEXT else LONG_CONTEXT - 1
        return _native.MetalDecodePlan(
            shape, embedding, layers, head, self._memory, context, isolated=True
        )

    # ---- what a pass reads

    def _make_inputs(self) -> None:
        rows, dim, material = self._rows, self._formats.head_dim, self._material
        self._workspace = torch.full((int(self._plan.workspace_bytes) // 4,), torch.nan)
        self._workspace = self._workspace.view(torch.uint8)
        self._positions = torch.tensor(POSITIONS[:rows])
        self._rope = known_answers.random_rope(material, rows, dim)
        blocks = [(block + 1) % _BLOCKS for block in range(max(POSITIONS) // BLOCK + 1)]
        self._tables = torch.tensor([blocks] * rows, dtype=torch.int32)
        layers = sum(kind in _CACHE_STEPS for kind, *_ in self._steps)
        self._slabs = [
            material.normal(2, layers, 1, self._kv_heads, BLOCK, dim).to(self._formats.kv_dtype)
            for _ in range(_BLOCKS)
        ]
        self._ids = torch.arange(rows) * 7 % self._sizes.vocabulary
        self._hidden = material.normal(rows, self._sizes.hidden)
        embeds, has_head = self._formats.table is not None, self._formats.head is not None
        if has_head:
            out, sampling = (
                torch.empty(rows, dtype=torch.int64),
                device_sampling.packed([(_SAMPLING, _SEED)] * rows),
            )
        else:
            out, sampling = torch.empty(rows, self._sizes.hidden), None
        self._out = out
        moved = self._moved
        self._arguments = (
            moved(self._ids if embeds else self._hidden), self._positions, moved(self._rope),
            moved(self._tables), sampling, [moved(slab) for slab in self._slabs], moved(out),
        )  # fmt: skip

    def _put(self, buffer: _Buffer, values: Tensor) -> Tensor:
        """Writes rows into the workspace, and returns them."""
        _, offset, size = buffer
        assert values.nbytes == size * self._rows
        self._workspace[offset : offset + values.nbytes] = values.flatten().view(torch.uint8)
        return values

    def _random(self, buffer: _Buffer, spread: float = 1.0) -> Tensor:
        """Random float32 rows [R, n], put into the workspace."""
        return self._put(buffer, spread * self._material.normal(self._rows, buffer[2] // 4))

    # ---- what it must give

    def _step_answers(self) -> Iterator[tuple[Answer, _Take]]:
        """Of the plan's steps, in their order."""
        formats = self._formats
        qkv = iter(dict.fromkeys((layer.q, layer.k, layer.v) for layer in formats.layers))
        gate_up = iter(dict.fromkeys((layer.gate, layer.up) for layer in formats.layers))
        output = iter(dict.fromkeys(layer.output for layer in formats.layers))
        down = iter(dict.fromkeys(layer.down for layer in formats.layers))
        cache_layer = 0
        for kind, kernel, other_kernel, reads, writes in self._steps:
            if kind == "embed":
                assert formats.table is not None
                rows = self._matrices["table", formats.table].dense()[self._ids]
                yield self._rows_answer(kernel, writes[0], rows)
            elif kind == "norm_qkv_rope_append":
                matrices = self._named("qkv", next(qkv))
                yield from self._qkv_answers(kernel, matrices, cache_layer, reads[0], writes[0])
            elif kind == "attention":
                exact = self._attention(self._random(reads[0], 2.0), cache_layer)
                yield self._rows_answer(kernel, writes[0], exact)
                if other_kernel:
                    yield self._rows_answer(other_kernel, writes[1], exact)
            elif kind == "output_residual":
                (matrix,) = self._named(["output"], [next(output)])
                yield self._residual_answer(kernel, matrix, reads, writes)
            elif kind == "norm_gate_up_swiglu":
                gate, up = self._named(["gate", "up"], next(gate_up))
                x = known_answers.normed(self._random(reads[0], 3.0), self._gamma)
                exact = known_answers.swiglu(gate.product(x), up.product(x))
                yield self._rows_answer(kernel, writes[0], exact)
            elif kind == "down_residual":
                (matrix,) = self._named(["down"], [next(down)])
                yield self._residual_answer(kernel, matrix, reads, writes)
            elif kind == "norm_head":
                assert formats.head is not None
                x = known_answers.normed(self._random(reads[0]), self._gamma)
                exact = self._matrices["head", formats.head].product(x)
                yield self._rows_answer(kernel, writes[0], exact)
            elif kind == "argmax":
                logits = self._random(reads[0], 3.0)
                yield self._rows_answer(kernel, writes[0], logits.argmax(-1))
                draws = [
                    device_sampling.draw(row.log_softmax(-1), _SAMPLING, _SEED, position)
                    for row, position in zip(logits, POSITIONS)
                ]
                yield self._rows_answer(other_kernel, writes[1], torch.tensor(draws))
            elif kind == "take_hidden":
                yield self._rows_answer(kernel, writes[0], self._hidden)
            elif kind == "give_hidden":
                yield self._rows_answer(kernel, writes[0], self._random(reads[0]))
            cache_layer += kind in _CACHE_STEPS

    def _named(self, names: str | list[str], forms: Any) -> list[Matrix]:
        return [self._matrices[name, form] for name, form in zip(names, forms, strict=True)]

    def _rows_answer(self, kernel: str, buffer: _Buffer, exact: Tensor) -> tuple[Answer, _Take]:
        """Rows [R, n] in the workspace: float32, or token ids."""
        _, offset, size = buffer
        dtype = torch.float32 if exact.is_floating_point() else torch.int64

        def take(workspace: Tensor, cache: Tensor) -> Tensor:
            rows = workspace[offset : offset + size * self._rows].view(dtype)
            return rows.view(exact.shape)

        return Answer(kernel, exact, SUMS), take

    def _residual_answer(
        self, kernel: str, matrix: Matrix, reads: list[_Buffer], writes: list[_Buffer]
    ) -> tuple[Answer, _Take]:
        x, hidden = self._random(reads[0]), self._random(reads[1])
        return self._rows_answer(kernel, writes[0], hidden.double() + matrix.product(x))

    def _qkv_answers(
        self, kernel: str, matrices: list[Matrix], layer: int, hidden: _Buffer, queries: _Buffer
    ) -> Iterator[tuple[Answer, _Take]]:
        x = known_answers.normed(self._random(hidden), self._gamma)
        q, k, v = (matrix.product(x) for matrix in matrices)
        yield self._rows_answer(kernel, queries, known_answers.rotated(q, self._rope))
        new = torch.stack([known_answers.rotated(k, self._rope), v])
        new = new.unflatten(-1, (self._kv_heads, -1))  # [2, R, kv_heads, head_dim]
        positions = torch.tensor(POSITIONS[: self._rows])
        blocks, slots = self._tables[0, positions // BLOCK].long(), positions % BLOCK
        written = torch.zeros(_BLOCKS, BLOCK, dtype=torch.bool)
        written[blocks, slots] = True
        before = self._by_position(torch.cat(self._slabs, 2), layer)
        rounded = _ROUNDED[self._formats.kv_dtype]
        yield (
            Answer(kernel, new, rounded),
            lambda _, cache: self._by_position(cache, layer)[:, blocks, slots],
        )
        yield (  # all else is as it was
            Answer(kernel, before[:, ~written], 0.0),
            lambda _, cache: self._by_position(cache, layer)[:, ~written],
        )

    def _attention(self, queries: Tensor, layer: int) -> Tensor:
        cache = self._by_position(torch.cat(self._slabs, 2), layer)
        keys, values = [], []
        for position in POSITIONS[: self._rows]:
            blocks = self._tables[0, : position // BLOCK + 1].long()
            both = cache[:, blocks].flatten(1, 2)[:, : position + 1].transpose(1, 2)
            keys.append(both[0])
            values.append(both[1])
        return known_answers.attention(queries, keys, values)

    @staticmethod
    def _by_position(cache: Tensor, layer: int) -> Tensor:
        """[2, blocks, 32, kv_heads, head_dim] of one layer."""
        return cache[:, layer].transpose(2, 3)
