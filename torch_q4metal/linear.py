"""Modules on packed weights: Q4Linear, Q4Embedding, and replace_linears for a model of your own."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from . import ops

log = logging.getLogger(__name__)

_PACKED = ("weight", "scales", "biases")


class PackedModule(nn.Module):
    """Holds one packed matrix W ``[N, K]`` as buffers; what Q4Linear and Q4Embedding share.

    ``weight`` is int32 here (uint32 tensors can be neither shifted nor pickled) and uint32 in
    ``state_dict()``, MLX's dtype; loading takes both. ``.to(dtype)`` moves nothing but the
    layer's own bias: rounding scales or biases to another dtype would change every weight.
    """

    weight: Tensor
    scales: Tensor
    biases: Tensor

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        biases: Tensor,
        *,
        group_size: int,
        bits: int,
        mode: str,
    ) -> None:
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.register_buffer("weight", weight.view(torch.int32))
        self.register_buffer("scales", scales)
        self.register_buffer("biases", biases)

    @property
    def _packed(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.scales, self.biases

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W ``[N, K]`` in ``dtype`` (None: the scales' dtype). A dense copy: for inspection."""
        return ops.dequantize(*self._packed, self.group_size, self.bits, self.mode, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self._buffers.pop(name) for name in _PACKED}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(kept)
        for name, tensor in kept.items():
            assert tensor is not None
            moved = fn(tensor)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].view(torch.uint32)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        key = f"{prefix}weight"
        if key in state_dict and state_dict[key].dtype == torch.uint32:
            state_dict = {**state_dict, key: state_dict[key].view(torch.int32)}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _empty_packed(
    rows: int, columns: int, group_size: int, bits: int, dtype: torch.dtype, device: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if columns % group_size:
        raise ValueError(f"{columns} columns are not a multiple of group_size={group_size}")
    weight = torch.zeros(rows, columns * bits // 32, dtype=torch.int32, device=device)
    scales = torch.zeros(rows, columns // group_size, dtype=dtype, device=device)
    return weight, scales, torch.zeros_like(scales)


class Q4Linear(PackedModule):
    """``y = x W^T + bias`` with W packed at 2, 3, 4, 5, 6 or 8 bits; replaces ``nn.Linear``.

    ``x [..., in_features]`` -> ``[..., out_features]`` in promote(x.dtype, scales.dtype).
    ``precision`` is "fast", "exact" (float32 arithmetic throughout) or "int8" (8-bit activations).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 64,
        bits: int = 4,
        mode: str = "affine",
        dtype: torch.dtype = torch.float32,
        precision: str = "fast",
        device: torch.device | str | None = None,
    ) -> None:
        """A layer of zeros to load a state dict into; ``dtype`` is for scales, biases, bias."""
        packed = _empty_packed(out_features, in_features, group_size, bits, dtype, device)
        super().__init__(*packed, group_size=group_size, bits=bits, mode=mode)
        self.in_features, self.out_features, self.precision = in_features, out_features, precision
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        )

    @classmethod
    def from_tensors(
        cls,
        weight: Tensor,
        scales: Tensor,
        biases: Tensor,
        bias: Tensor | None = None,
        *,
        group_size: int,
        bits: int,
        mode: str = "affine",
        precision: str = "fast",
    ) -> "Q4Linear":
        """A layer on these very tensors, without a copy; shapes as ops.matmul takes them."""
        layer = cls.__new__(cls)
        PackedModule.__init__(
            layer, weight, scales, biases, group_size=group_size, bits=bits, mode=mode
        )
        layer.in_features, layer.out_features = scales.shape[1] * group_size, scales.shape[0]
        layer.precision = precision
        if isinstance(bias, nn.Parameter):
            layer.bias = bias
        else:
            layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int = 64, bits: int = 4) -> "Q4Linear":
        """Quantizes an ``nn.Linear`` with MLX's numbers; in_features must divide into groups."""
        with torch.no_grad():
            packed = ops.quantize(linear.weight.detach(), group_size, bits)
        return cls.from_tensors(*packed, linear.bias, group_size=group_size, bits=bits)

    def forward(self, x: Tensor) -> Tensor:
        return ops.matmul(
            x, *self._packed, self.bias, True, self.group_size, self.bits, self.mode, self.precision
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}, scales={_short(self.scales.dtype)}"
        )


class Q4Embedding(PackedModule):
    """Rows of a packed table; takes the place of ``nn.Embedding``, and of a head tied to it.

    ``ids [...]`` -> ``[..., embedding_dim]`` in ``dtype`` (None: the scales' dtype).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        group_size: int = 64,
        bits: int = 4,
        mode: str = "affine",
        dtype: torch.dtype = torch.float32,
        precision: str = "fast",
        device: torch.device | str | None = None,
    ) -> None:
        """A table of zeros to load a state dict into; ``dtype`` is that of scales and biases."""
        packed = _empty_packed(num_embeddings, embedding_dim, group_size, bits, dtype, device)
        super().__init__(*packed, group_size=group_size, bits=bits, mode=mode)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.precision, self.dtype = precision, None

    @classmethod
    def from_tensors(
        cls,
        weight: Tensor,
        scales: Tensor,
        biases: Tensor,
        *,
        group_size: int,
        bits: int,
        mode: str = "affine",
        dtype: torch.dtype | None = None,
        precision: str = "fast",
    ) -> "Q4Embedding":
        """A table on these very tensors; ``dtype`` is that of the rows that ``forward`` returns."""
        table = cls.__new__(cls)
        PackedModule.__init__(
            table, weight, scales, biases, group_size=group_size, bits=bits, mode=mode
        )
        table.num_embeddings, table.embedding_dim = scales.shape[0], scales.shape[1] * group_size
        table.precision, table.dtype = precision, dtype
        return table

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, group_size: int = 64, bits: int = 4
    ) -> "Q4Embedding":
        """Quantizes an ``nn.Embedding`` with MLX's numbers, as Q4Linear.from_linear does."""
        with torch.no_grad():
            packed = ops.quantize(embedding.weight.detach(), group_size, bits)
        return cls.from_tensors(*packed, group_size=group_size, bits=bits)

    dtype: torch.dtype | None

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, *self._packed, self.group_size, self.bits, self.mode, self.dtype)

    def as_linear(self, x: Tensor) -> Tensor:
        """The tied head: ``x [..., embedding_dim]`` -> logits ``[..., num_embeddings]``."""
        return ops.matmul(
            x, *self._packed, None, True, self.group_size, self.bits, self.mode, self.precision
        )

    def extra_repr(self) -> str:
        return (
            f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, "
            f"bits={self.bits}, group_size={self.group_size}, scales={_short(self.scales.dtype)}"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def replace_linears(
    module: nn.Module,
    bits: int = 4,
    group_size: int = 64,
    filter: Callable[[str, nn.Linear], bool] = lambda name, linear: True,
) -> nn.Module:
    """Quantizes the ``nn.Linear`` layers of a model in place and returns the model.

    ``filter(name, linear)`` says which ones. Subclasses of ``nn.Linear`` are left alone, since
    their owners read ``weight`` themselves (nn.MultiheadAttention does), and so are layers
    whose in_features is no multiple of ``group_size``, which the log names. A layer that occurs
    twice is quantized once.
    """
    if type(module) is nn.Linear and filter("", module):
        return Q4Linear.from_linear(module, group_size, bits)
    made: dict[nn.Module, Q4Linear] = {}
    for name, linear in list(module.named_modules(remove_duplicate=False)):
        if type(linear) is not nn.Linear or not filter(name, linear):
            continue
        if linear.in_features % group_size:
            log.info(
                "%s stays dense: in_features=%d, group_size=%d",
                name,
                linear.in_features,
                group_size,
            )
            continue
        if linear not in made:
            made[linear] = Q4Linear.from_linear(linear, group_size, bits)
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, made[linear])
    return module
