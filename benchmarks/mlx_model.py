"""Writes an MLX 4-bit checkpoint of a real shape with random weights: group size 64, f16 scales.

Every bias is -8 * scale, so that GGUF's Q4_0 and OpenVINO's u4 with a zero point of 8 can hold the
same weights. Codes are uniform from 1 to 15, with some more 8: a mean of 8, since a matrix whose
mean is not 0 pushes every token in one direction, until all texts end in one repeated token. Scales
make a matrix keep the size of its input, so that activations stay of order one in any depth.
"""

import json
from pathlib import Path

import numpy as np
from shapes import Shape

from torch_q4metal.model_layout import ModelSizes, ModuleSpec, model_modules
from torch_q4metal.output_folder import output_folder
from torch_q4metal.safetensors_writer import ShardWriter, TensorSpec, packed_specs

GROUP_SIZE = 64
CODE_STD = 4.18  # of codes around 8
_PIECE_WEIGHTS = 1 << 26


def write_mlx(shape: Shape, folder: Path) -> None:
    """Makes ``folder``; the same shape gives the same bytes every time."""
    sizes = ModelSizes(
        layers=shape.layers,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab=shape.vocabulary,
        tied=shape.tied,
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
    )
    modules = list(model_modules(sizes))
    random = np.random.Generator(np.random.SFC64(len(shape.name) + shape.hidden))
    with output_folder(folder) as target:
        (target / "config.json").write_text(json.dumps(shape.config(), indent=4))
        specs = [spec for module in modules for spec in _specs(module)]
        with ShardWriter(target, specs) as writer:
            for module in modules:
                _write(module, writer, random)


def _specs(module: ModuleSpec) -> list[TensorSpec]:
    if not module.is_matrix:
        return [TensorSpec(f"{module.path}.weight", "F16", module.shape)]
    specs = packed_specs(module.path, *module.shape, bits=4, group_size=GROUP_SIZE, dtype="F16")
    if module.bias:
        specs.append(TensorSpec(f"{module.path}.bias", "F16", module.shape[:1]))
    return specs


def _write(module: ModuleSpec, writer: ShardWriter, random: np.random.Generator) -> None:
    if not module.is_matrix:
        writer.write(f"{module.path}.weight", 1 + _noise(random, module.shape))
        return
    rows, columns = module.shape
    if module.bias:
        writer.write(f"{module.path}.bias", _noise(random, (rows,)))
    step = max(1, _PIECE_WEIGHTS // columns)
    for begin in range(0, rows, step):
        count = min(step, rows - begin)
        words = _codes(random, (count, columns // 8))
        size = 1 / (CODE_STD * columns**0.5)
        spread = random.random((count, columns // GROUP_SIZE), dtype=np.float32)
        scales = (size * (0.75 + spread / 2)).astype(np.float16)
        for suffix, data in (("weight", words), ("scales", scales), ("biases", scales * -8)):
            row_bytes = data.nbytes // count
            writer.write(f"{module.path}.{suffix}", data, begin * row_bytes)


def _codes(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """uint32 words of 8 codes; a code of 0 becomes 8."""
    words = random.integers(1 << 32, size=shape, dtype=np.uint32)
    ones = np.uint32(0x11111111)
    used = (words | words >> 1 | words >> 2 | words >> 3) & ones
    return words | (used ^ ones) << 3


def _noise(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (0.1 * random.standard_normal(shape, dtype=np.float32)).astype(np.float16)
