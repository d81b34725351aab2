"""Small random matrices in a given model's formats, on the CPU and on the device to be checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .known_answers import Material, Matrix
from .model_formats import Format, ModelFormats

_WITH_BIAS = ("q", "v", "output", "up")


@dataclass(frozen=True)
class Sizes:
    """Of the small model. K above 512 is more than a simdgroup takes at a time."""

    hidden: int
    intermediate: int
    vocabulary: int


class SmallModel:
    """One matrix for each format and place that the given model has.

    ``matrices``  on the CPU, by place ("q", ..., "table", "head") and format
    ``heads``     query heads, ``kv_heads`` those of keys and values
    ``material``  of which other random tensors are made
    """

    def __init__(self, formats: ModelFormats, sizes: Sizes, device: torch.device | str) -> None:
        self.formats, self.sizes, self.device = formats, sizes, device
        self.kv_heads, self.heads = _heads(formats)
        self.material = Material(torch.Generator().manual_seed(0))
        self._on_device: dict[int, Tensor] = {}  # by the address of the CPU's
        self.matrices = self._make_matrices()

    @property
    def moved_bytes(self) -> int:
        """Of all tensors that are on the device."""
        return sum(tensor.nbytes for tensor in self._on_device.values())

    def moved(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; what shares memory on the CPU shares it there."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._on_device:
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
            self._on_device[storage.data_ptr()] = whole.to(self.device)
        return self._on_device[storage.data_ptr()][: tensor.numel()].view(tensor.shape)

    def _shapes(self) -> dict[str, tuple[int, int]]:
        hidden, intermediate = self.sizes.hidden, self.sizes.intermediate
        dim = self.formats.head_dim
        query, kv = self.heads * dim, self.kv_heads * dim
        return {
            "q": (query, hidden),
            "k": (kv, hidden),
            "v": (kv, hidden),
            "output": (hidden, query),
            "gate": (intermediate, hidden),
            "up": (intermediate, hidden),
            "down": (hidden, intermediate),
            "table": (self.sizes.vocabulary, hidden),
            "head": (self.sizes.vocabulary, hidden),
        }

    def _make_matrices(self) -> dict[tuple[str, Format], Matrix]:
        wanted: dict[tuple[str, Format], tuple[int, int]] = {}
        shapes = self._shapes()
        named = [item for layer in self.formats.layers for item in vars(layer).items()]
        named += [("table", self.formats.table), ("head", self.formats.head)]
        for name, form in named:
            if form is not None:
                wanted[name, form] = shapes[name]
        largest: dict[Format, int] = {}
        for (_, form), (n, k) in wanted.items():
            largest[form] = max(n * k, largest.get(form, 0))
        self.material.prepare(largest)
        return {
            key: self.material.matrix(key[1], n, k, key[0] in _WITH_BIAS)
            for key, (n, k) in wanted.items()
        }


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
