"""A small model in a given model's formats: inputs and answers of each of its Metal kernels.

Every step of its decode plan has memory of its own (csrc/plan/plan.h: isolate), so each kernel is
seen alone, and all of them run in one command buffer, behind the operators that read prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _extension, device_sampling, known_answers, ops
from .cache import BLOCK
from .decode_plan import NATIVE_DTYPES
from .known_answers import NORM_EPS, Answer, Material, Matrix
from .model_formats import Format, ModelFormats
from .models.base import MATVEC_ROWS
from .sampling import SamplingParams

POSITIONS = (700, 3, 133, 39, 73, 205, 17, 341)
"""Of rows. Different modulo 32: rows share the cache's blocks, and no two write one place."""
_BLOCKS = 2
LONG_CONTEXT = 1025
"""The shortest context that needs attention's kernels for long ones."""
_PROMPT_ROWS = (9, 17, 33)  # one for each tile of the matmul
_CACHE_STEPS = ("norm_qkv_rope_append", "attention")
_SAMPLING, _SEED = SamplingParams(temperature=0.8, top_k=20), (1 << 40) + 3
# Relative rms errors: float32 sums in another order; tiles and results in 16 bits.
_SUMS = 2e-5
_PRODUCT = {torch.float32: _SUMS, torch.float16: 3e-3, torch.bfloat16: 1.2e-2}
_ROUNDED = {torch.float32: _SUMS, torch.float16: 6e-4, torch.bfloat16: 5e-3}

_native = _extension.load()
_Buffer = tuple[str, int, int]  # name, offset in the workspace, bytes a row
_Take = Callable[[Tensor, Tensor], Tensor]  # of the workspace and the cache, both on the CPU


@dataclass(frozen=True)
class Sizes:
    """Of the small model. K above 512 is more than a simdgroup takes at a time."""

    hidden: int
    intermediate: int
    vocabulary: int


class KernelCase:
    """The small model on ``device``, for ``rows`` (1 to 8) tokens at once.

    ``data_bytes``: of all tensors on the device. Building it compiles nothing.
    """

    def __init__(
        self, formats: ModelFormats, rows: int, sizes: Sizes, device: torch.device | str
    ) -> None:
        self._formats, self._rows, self._sizes, self._device = formats, rows, sizes, device
        self._kv_heads, self._heads = _heads(formats)
        self._material = Material(torch.Generator().manual_seed(0))
        self._on_device: dict[int, Tensor] = {}  # by the address of the CPU's
        self._matrices = self._make_matrices()
        self._gamma = self._material.uniform(sizes.hidden, 0.5, 1.5)
        self._memory = _native.DeviceMemory()
        self._plan = self._build_plan()
        self._steps = self._plan.steps(rows)
        self._make_inputs()

    @property
    def data_bytes(self) -> int:
        moved = sum(tensor.nbytes for tensor in self._on_device.values())
        logits = 4 * MATVEC_ROWS * self._sizes.vocabulary  # the plan's own
        return moved + int(self._plan.workspace_bytes) + logits

    def run(self) -> list[tuple[Answer, Tensor]]:
        """Each answer with what the device gave, on the CPU."""
        answers = list(self._step_answers())
        products = list(self._prompt_answers()) if self._rows == 1 else []
        workspace = torch.ops.q4metal.metal_workspace(self._plan.handle)
        workspace.copy_(self._workspace)
        made = [call() for _, call in products]  # encoded, and handed over with the plan's steps
        torch.ops.q4metal.decode_step(self._plan.handle, *self._arguments)
        after = workspace.cpu()
        cache = torch.cat([self._moved(slab).cpu() for slab in self._slabs], 2)
        found = [(answer, result.cpu()) for (answer, _), result in zip(products, made)]
        return found + [(answer, take(after, cache)) for answer, take in answers]

    # ---- what the plan is made of

    def _shapes(self) -> dict[str, tuple[int, int]]:
        hidden, intermediate = self._sizes.hidden, self._sizes.intermediate
        dim = self._formats.head_dim
        query, kv = self._heads * dim, self._kv_heads * dim
        return {
            "q": (query, hidden),
            "k": (kv, hidden),
            "v": (kv, hidden),
            "output": (hidden, query),
            "gate": (intermediate, hidden),
            "up": (intermediate, hidden),
            "down": (hidden, intermediate),
            "table": (self._sizes.vocabulary, hidden),
            "head": (self._sizes.vocabulary, hidden),
        }

    def _make_matrices(self) -> dict[tuple[str, Format], Matrix]:
        wanted: dict[tuple[str, Format], tuple[int, int]] = {}
        shapes = self._shapes()
        named = [item for layer in self._formats.layers for item in vars(layer).items()]
        named += [("table", self._formats.table), ("head", self._formats.head)]
        for name, form in named:
            if form is not None:
                wanted[name, form] = shapes[name]
        largest: dict[Format, int] = {}
        for (_, form), (n, k) in wanted.items():
            largest[form] = max(n * k, largest.get(form, 0))
        self._material.prepare(largest)
        with_bias = ("q", "v", "output", "up")
        return {
            key: self._material.matrix(key[1], n, k, key[0] in with_bias)
            for key, (n, k) in wanted.items()
        }

    def _moved(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; what shares memory on the CPU shares it there."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._on_device:
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
            self._on_device[storage.data_ptr()] = whole.to(self._device)
        return self._on_device[storage.data_ptr()][: tensor.numel()].view(tensor.shape)

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
        self._x = material.normal(_PROMPT_ROWS[-1], self._largest_k()).to(self._formats.dtype)
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
        if rows == 1:
            moved(self._ids), moved(self._x)  # for prompts, and so that they are counted

    def _largest_k(self) -> int:
        return max((matrix.shape[1] for matrix in self._matrices.values()), default=1)

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

    def _prompt_answers(self) -> Iterator[tuple[Answer, Callable[[], Tensor]]]:
        """Of the operators that read prompts."""
        formats = self._formats
        for form in formats.products:
            matrix = next(m for (_, f), m in self._matrices.items() if f == form)
            counts = (1, *_PROMPT_ROWS) if form == formats.head else _PROMPT_ROWS
            for count in counts:
                yield self._product(matrix, count)
        table = formats.table
        if table is not None and table.bits:
            matrix, ids = self._matrices["table", table], self._ids
            weight, scales, biases = map(self._moved, matrix.packed)
            moved = self._moved(ids)
            yield (
                Answer(f"q4_embedding ({table})", matrix.dense()[ids], _SUMS),
                lambda: ops.embedding(
                    moved, weight, scales, biases, table.group_size, table.bits, dtype=torch.float32
                ),
            )

    def _product(self, matrix: Matrix, count: int) -> tuple[Answer, Callable[[], Tensor]]:
        form, dtype, precision = matrix.format, self._formats.dtype, self._formats.precision
        columns = matrix.shape[1]
        x, moved = (
            whole.flatten()[: count * columns].view(count, columns)
            for whole in (self._x, self._moved(self._x))
        )
        weight, scales, biases = map(self._moved, matrix.packed)
        bias = None if matrix.bias is None else self._moved(matrix.bias)
        result = torch.promote_types(dtype, form.dtype)
        name = "q4_matvec" if count == 1 else "q4_matmul"
        kernel = f"{name} ({form}, x {str(dtype).removeprefix('torch.')}, {count} rows)"
        return (
            Answer(kernel, matrix.product(x), _PRODUCT[result]),
            lambda: ops.matmul(
                moved, weight, scales, biases, bias, True, form.group_size, form.bits,
                precision=precision,
            ),
        )  # fmt: skip

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

        return Answer(kernel, exact, _SUMS), take

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


def _heads(formats: ModelFormats) -> tuple[int, int]:
    """(heads of keys and values, query heads): as few as make whole groups of the output matrix.

    As many query heads share keys and values as a threadgroup takes of the model's (plan_launch.h).
    """
    group = formats.heads // formats.kv_heads
    shared = max(count for count in range(1, 9) if group % count == 0)
    sizes = [layer.output.group_size or 16 for layer in formats.layers]
    for kv_heads in range(1, formats.kv_heads + 1):
        if all(kv_heads * shared * formats.head_dim % size == 0 for size in sizes):
            return kv_heads, kv_heads * shared
    return formats.kv_heads, formats.heads
