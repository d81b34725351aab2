"""Known-answer tests of every kernel of a device, a row each: what ``doctor`` prints.

On the CPU those of the instruction set in use, on MPS those of csrc/metal, in every format and
against float64 (reference.py, known_answers.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import _extension, known_answers, ops, reference
from .cache import BLOCK
from .device_weights import DeviceWeights
from .known_answers import NORM_EPS, Material, relative_error
from .model_formats import Format, LayerFormats, ModelFormats
from .models.base import MATVEC_ROWS
from .safetensors_header import read_header
from .self_check import SelfCheckError, check

DTYPES = reference.FLOAT_DTYPES
# Every pair of bits and group size, and each of those with every dtype.
FORMATS = tuple(
    Format(bits, group_size, DTYPES[(i + j) % 3])
    for i, bits in enumerate(reference.BITS)
    for j, group_size in enumerate(reference.GROUP_SIZES)
)
DENSE = tuple(Format(0, 0, dtype) for dtype in DTYPES)

_ROUNDING = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_EXACT, _FAST, _FAST_ROWS = 2e-5, 1e-4, 5e-3  # what ops.matmul promises


@dataclass(frozen=True)
class Row:
    """One line of the table: what was compared, whether it is right, and by how much."""

    name: str
    ok: bool
    text: str


def check_cpu(formats: Iterable[Format] = FORMATS) -> Iterator[Row]:
    """The operators, and the decode plan, with the CPU's kernels in use."""
    kernels = ops.cpu_kernels()
    for row in check_operators(torch.device("cpu"), tuple(formats)):
        yield Row(f"{kernels} {row.name}", row.ok, row.text)
    for precision, bound in (("exact", _EXACT), ("fast", 10 * _FAST)):
        error = _plan_error(precision)
        text = f"relative error {error:.1e}, allowed {bound:.1e}"
        yield Row(f"{kernels} decode plan, {precision}", error <= bound, text)


def check_mps(formats: Iterable[Format] = (*FORMATS, *DENSE)) -> Iterator[Row]:
    """The operators, and the steps of decode plans, with the Metal kernels. This takes some
    seconds: each format's kernels are compiled.
    """
    formats = tuple(formats)
    for row in check_operators(torch.device("mps"), tuple(f for f in formats if f.bits)):
        yield Row(f"mps {row.name}", row.ok, row.text)
    yield _check_plan("mps plan, a stage in the middle", _formats_of(0, formats[0], ends=False), 1)
    yield from check_metal_plans(formats)


def check_loading() -> Row:
    """Whether weights arrive on the GPU: of a whole file as safetensors reads it, and of a part."""
    written = {name: torch.arange(i, i + 4096).view(64, 64) for i, name in enumerate("abc")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "known.safetensors"
        save_file(written, file)
        infos = read_header(file)
        wrong = [
            f"{name} of {', '.join(names)}"
            for names in ("abc", "b")
            for weights in [DeviceWeights({n: infos[n] for n in names}, torch.device("mps"))]
            for name in names
            if not torch.equal(weights.tensor(name).cpu(), written[name])
        ]
    if wrong:
        return Row("mps loading", False, f"other bytes arrive on the GPU: {'; '.join(wrong)}")
    return Row("mps loading", True, "whole files and parts of them arrive on the GPU")


def check_metal_plans(formats: Iterable[Format]) -> Iterator[Row]:
    """A model of each format, with different heads, dtypes and numbers of rows."""
    for index, form in enumerate(formats):
        rows = 1 + index % 8
        name = f"mps plan, {form}, {rows} row{'s' * (rows > 1)}"
        yield _check_plan(name, _formats_of(index, form), rows)


def _formats_of(index: int, form: Format, ends: bool = True) -> ModelFormats:
    """``ends``: whether it embeds and has a head; else it takes and gives residual rows."""
    return ModelFormats(
        layers=(LayerFormats.uniform(form),),
        table=form if ends else None,
        head=form if ends else None,
        kv_dtype=form.dtype,
        head_dim=(64, 128)[index % 2],
        heads=(9, 14, 32)[index % 3],
        kv_heads=(3, 2, 8)[index % 3],
        context=8192,
        dtype=DTYPES[(index + 1) % 3],
        precision="fast",
    )


def _check_plan(name: str, model: ModelFormats, rows: int) -> Row:
    try:
        return Row(name, True, str(check(model, rows)))
    except SelfCheckError as error:
        return Row(name, False, str(error))


def check_operators(device: torch.device, formats: tuple[Format, ...]) -> Iterator[Row]:
    """Each operator in all formats: the largest part of the error that is allowed."""
    for name, call in _OPERATORS.items():
        worst, where = 0.0, ""
        try:
            for form in formats:
                share = call(form, device)
                if not share <= worst:  # NaN too
                    worst, where = share, str(form)
        except RuntimeError as error:  # a kernel that does not compile, say
            yield Row(name, False, str(error).splitlines()[0])
            continue
        text = f"at most {worst:.0%} of the error allowed, in {len(formats)} formats"
        if not worst <= 1.0:
            text = f"{worst:.3g} times the error allowed ({where})"
        yield Row(name, worst <= 1.0, text)


def _packed(form: Format, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    material = Material(torch.Generator().manual_seed(form.bits))
    material.prepare({form: rows * columns})
    return material.matrix(form, rows, columns, bias=False).packed


def _share(result: Tensor, expected: Tensor, bound: float) -> float:
    return relative_error(result.cpu(), expected) / (bound + _ROUNDING[result.dtype])


def _product(rows: int, transpose: bool = True) -> Callable[[Format, torch.device], float]:
    """``rows`` of x, 0 for 2 to 8: each number of them in some formats."""

    def share(form: Format, device: torch.device) -> float:
        count = rows or 2 + (form.bits + form.group_size // 32) % (MATVEC_ROWS - 1)
        bound = _FAST if count <= MATVEC_ROWS and transpose else _FAST_ROWS
        weight, scales, biases = _packed(form, 24, 640)
        generator = torch.Generator().manual_seed(count)
        x = torch.randn(count, 640 if transpose else 24, generator=generator).to(form.dtype)
        numbers = transpose, form.group_size, form.bits
        x_there, *w = (part.to(device) for part in (x, weight, scales, biases))
        result = ops.matmul(x_there, w[0], w[1], w[2], None, *numbers)
        expected = reference.matmul(x, weight, scales, biases, None, *numbers)
        return _share(result, expected, bound)

    return share


def _dequantize(form: Format, device: torch.device) -> float:
    """In the scales' dtype it is bit for bit what the specification says."""
    packed = _packed(form, 24, 640)
    numbers = form.group_size, form.bits
    weight, scales, biases = (part.to(device) for part in packed)
    result = ops.dequantize(weight, scales, biases, *numbers)
    return 0.0 if torch.equal(result.cpu(), reference.dequantize(*packed, *numbers)) else torch.inf


def _embedding(form: Format, device: torch.device) -> float:
    packed, ids = _packed(form, 24, 640), torch.tensor([3, 23, 0])
    numbers = form.group_size, form.bits
    weight, scales, biases = (part.to(device) for part in packed)
    moved = ids.to(device)
    result = ops.embedding(moved, weight, scales, biases, *numbers, dtype=torch.float32)
    expected = reference.dequantize(*packed, *numbers, dtype=torch.float64)[ids]
    return _share(result, expected, _EXACT)


def _quantize(form: Format, device: torch.device) -> float:
    w = torch.randn(24, 640, generator=torch.Generator().manual_seed(1)).to(form.dtype)
    numbers = form.group_size, form.bits
    result = ops.quantize(w.to(device), *numbers)
    same = map(torch.equal, (part.cpu() for part in result), reference.quantize(w, *numbers))
    return 0.0 if all(same) else torch.inf


_OPERATORS: dict[str, Callable[[Format, torch.device], float]] = {
    "matvec": _product(1),
    "matmul, 2 to 8 rows": _product(0),
    "matmul, 9 rows": _product(9),
    "matmul, 70 rows": _product(70),
    "matmul, transpose=False": _product(9, transpose=False),
    "embedding": _embedding,
    "dequantize": _dequantize,
    "quantize": _quantize,
}


def _plan_error(precision: str) -> float:
    """Of the CPU's decode plan: logits after three tokens of a model with one layer."""
    form, context = Format(4, 64, torch.float32), 3
    hidden, inner, vocabulary, heads, kv_heads, dim = 128, 192, 96, 4, 2, 32
    shapes = {
        "q": (heads * dim, hidden), "k": (kv_heads * dim, hidden), "v": (kv_heads * dim, hidden),
        "output": (hidden, heads * dim), "gate": (inner, hidden), "up": (inner, hidden),
        "down": (hidden, inner), "table": (vocabulary, hidden), "head": (vocabulary, hidden),
    }  # fmt: skip
    material = Material(torch.Generator().manual_seed(0))
    material.prepare({form: hidden * inner})
    w = {name: material.matrix(form, *shape, bias=name == "q") for name, shape in shapes.items()}
    gamma = material.uniform(hidden, 0.5, 1.5)
    native = _extension.load()

    def segment(name: str) -> Any:
        rows, columns = shapes[name]
        weight, scales, biases = w[name].packed
        bias = w[name].bias
        return native.packed_segment(
            weight.data_ptr(), scales.data_ptr(), biases.data_ptr(), native.DType.float32, rows,
            columns, form.group_size, form.bits, 0 if bias is None else bias.data_ptr(),
        )  # fmt: skip

    layer = native.Layer(gamma.data_ptr(), *map(segment, ("q", "k", "v", "output")),
                         gamma.data_ptr(), *map(segment, ("gate", "up", "down")))  # fmt: skip
    shape = native.Shape(
        hidden, inner, heads, kv_heads, dim, vocabulary, 1, NORM_EPS, dim**-0.5,
        native.DType.float32, getattr(native.Precision, precision),
    )  # fmt: skip
    head = native.Head(gamma.data_ptr(), segment("head"))
    plan = native.DecodePlan(shape, segment("table"), [layer], head, context)
    rope = known_answers.random_rope(material, context, dim)
    slab, table = torch.zeros(2, 1, 1, kv_heads, BLOCK, dim), torch.zeros(1, 1, dtype=torch.int32)
    logits = torch.empty(1, vocabulary)
    kept: list[Tensor] = []  # keys and values [2, kv_heads, 1, dim] of each position
    for position in range(context):
        ids, at = torch.tensor([7 * position]), torch.tensor([position])
        turn = rope[position : position + 1]
        ops.decode_step(plan.handle, ids, at, turn, table, [slab], logits)
        h = w["table"].dense()[ids]
        x = known_answers.normed(h, gamma)
        keys = known_answers.rotated(w["k"].product(x), turn)
        both = torch.stack([keys, w["v"].product(x)])
        kept.append(both.view(2, kv_heads, 1, dim))
        queries = known_answers.rotated(w["q"].product(x), turn)
        cached = torch.cat(kept, 2)
        h = h + w["output"].product(known_answers.attention(queries, [cached[0]], [cached[1]]))
        x = known_answers.normed(h, gamma)
        h = h + w["down"].product(known_answers.swiglu(w["gate"].product(x), w["up"].product(x)))
    plan.release()
    return relative_error(logits, w["head"].product(known_answers.normed(h, gamma)))
