"""``load_packed``: fills any module whose names match with the packed layers of an MLX checkpoint.

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    load_packed(model, "path/to/mlx-model").generate(...)

Everything is checked against the file headers before the module is touched: an error leaves it as
it was. On the CPU tensors stay in the memory-mapped files, so a filled model takes what its files
take; on a GPU they are read once, to there, and nothing of the files stays in memory.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import huge_pages
from .checkpoint import SCALE_DTYPES, Checkpoint
from .config import LANGUAGE_MODEL, QuantParams
from .device import resolve_device
from .device_weights import DeviceWeights
from .errors import CheckpointError, Q4MetalError
from .linear import Q4Embedding, Q4Linear
from .safetensors_header import DTYPE_NAMES, printable

logger = logging.getLogger(__name__)

_TABLES = (nn.Embedding, Q4Embedding)
_MATRICES = (nn.Linear, Q4Linear, *_TABLES)
_PACKED_KEYS = ("weight", "scales", "biases")
_HARMLESS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


class TiedHead(nn.Module):
    """The output projection of a model whose head is its packed embedding table.

    ``x [..., embedding_dim]`` -> logits ``[..., num_embeddings]``. It owns no tensors:
    ``state_dict`` has none under its name, as in MLX's files, and ``.to(device)`` moves the table
    once.
    """

    def __init__(self, embedding: Q4Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # a tuple hides the module from registration

    @property
    def embedding(self) -> Q4Embedding:
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding.as_linear(x)

    def extra_repr(self) -> str:
        table = self.embedding
        return f"in_features={table.embedding_dim}, out_features={table.num_embeddings}"


def load_packed(
    module: nn.Module,
    path: str | Path | Checkpoint,
    *,
    prefix: str = "",
    precision: str | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Fill ``module`` in place from the checkpoint directory ``path`` and return it.

    Every ``nn.Linear`` or ``nn.Embedding`` whose tensor ``{prefix}{name}.scales`` exists is
    replaced by a Q4Linear or Q4Embedding on the file's own bytes, mapped, or on Linux read into
    huge pages where there is memory enough; all other parameters and
    persistent buffers get the checkpoint's tensors in the checkpoint's dtype. A head without
    tensors of its own shares the embedding's. The module may be on the meta device; afterwards
    nothing is.

    ``precision`` is that of the packed layers, "fast", "exact" or "int8" (None: their default).
    ``device`` is "cpu" (or None), "mps" or "auto"; Q4MetalError says why it is not available.
    Raises CheckpointError, naming the tensor, for one that is missing, does not fit, or has no
    place.
    """
    place = resolve_device(device)
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    prefix = prefix.removeprefix(LANGUAGE_MODEL)  # Checkpoint's names come without it
    with torch.device("cpu"):  # the caller may still be inside torch.device("meta")
        plan = _Plan(module, checkpoint, prefix)
        size = sum(checkpoint.info(name).nbytes for name in plan.names)
        if place.type != "cpu":
            infos = {name: checkpoint.info(name) for name in plan.names}
            tensor_of = DeviceWeights(infos, place).tensor
        elif huge_pages.are_worthwhile(size):
            tensor_of = huge_pages.HugePageWeights(checkpoint, plan.names).tensor
        else:
            tensor_of = checkpoint.tensor
        _fill(plan, tensor_of, place, precision)
    return module


@dataclass
class _Slot:
    """One place of a parameter or buffer, and the tensor that will fill it."""

    owner: nn.Module
    key: str
    name: str
    old: Tensor


@dataclass
class _Packed:
    """One matrix that will be packed: where it is now and where its tensors lie."""

    old: nn.Module
    path: str  # with a dot at its end
    params: QuantParams


@dataclass
class _Plan:
    """What goes where. Making it reads headers only and raises every error there can be."""

    module: nn.Module
    checkpoint: Checkpoint
    prefix: str
    places: dict[nn.Module, list[str]] = field(default_factory=dict)
    packed: list[_Packed] = field(default_factory=list)
    dense: list[_Slot] = field(default_factory=list)
    missing: list[_Slot] = field(default_factory=list)
    heads: dict[nn.Module, nn.Module] = field(default_factory=dict)
    computed: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)  # of the tensors that the module takes

    def __post_init__(self) -> None:
        for name, part in self.module.named_modules(remove_duplicate=False):
            self.places.setdefault(part, []).append(name)
        for part, names in self.places.items():
            self.names.update(self._place(part, names))
            self.computed += _computed_buffers(names[0], part)
        self._resolve_missing()
        unused = [
            name
            for name in sorted(self.checkpoint.tensors)
            if name.startswith(self.prefix)
            and name not in self.names
            and not _HARMLESS.search(name)
        ]
        if unused:
            more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
            shown = ", ".join(map(printable, unused[:5]))
            raise CheckpointError(
                f"{self.checkpoint.path}: {type(self.module).__name__} has no place for {shown}"
                f"{more}."
            )

    def _place(self, part: nn.Module, names: list[str]) -> Iterator[str]:
        """Plans one module's own tensors and yields the checkpoint names that they use."""
        own = dict(_own_tensors(part))
        paths = [f"{self.prefix}{name}." if name else self.prefix for name in names]
        path = next(
            (p for p in paths if any(self.checkpoint.has(p + key) for key in own)), paths[0]
        )
        if self.checkpoint.has(f"{path}scales") and "scales" not in own:
            self._require_packable(part, path)
        if _is_matrix(part) and self.checkpoint.has(f"{path}weight"):
            params = self.checkpoint.quant_params(path.removesuffix("."), _size(part)[1])
            if params is not None:
                yield from self._place_packed(part, path, params)
                return
        for key, old in own.items():
            slot = _Slot(part, key, path + key, old)
            if not self.checkpoint.has(slot.name):
                self.missing.append(slot)
                continue
            self._require_fit(slot.name, old)
            self.dense.append(slot)
            yield slot.name

    def _place_packed(self, part: nn.Module, path: str, params: QuantParams) -> Iterator[str]:
        if part is self.module:
            raise Q4MetalError(
                f"a single {type(part).__name__} cannot be replaced in place; take "
                "torch_q4metal.Q4Linear.from_tensors."
            )
        rows, columns = _size(part)
        weight = self.checkpoint.info(f"{path}weight")
        if weight.shape[0] != rows:
            raise CheckpointError(
                f"{weight.file}: tensor {printable(weight.name)} has {weight.shape[0]} rows, but "
                f"the module has {rows} x {columns} weights."
            )
        self.packed.append(_Packed(part, path, params))
        yield from (path + key for key in _PACKED_KEYS)
        if (bias := getattr(part, "bias", None)) is not None:
            self._require_fit(f"{path}bias", bias)
            yield f"{path}bias"

    def _require_packable(self, part: nn.Module, path: str) -> None:
        limited = isinstance(part, nn.Embedding) and part.max_norm is not None
        if not _is_matrix(part) or limited:
            kind = "an Embedding with max_norm" if limited else f"a {type(part).__name__}"
            raise CheckpointError(
                f"{self.checkpoint.path}: {printable(path + 'weight')} is packed, but the module "
                f"has {kind} there, which cannot be; only plain nn.Linear and nn.Embedding can."
            )

    def _require_fit(self, name: str, old: Tensor) -> None:
        info = self.checkpoint.info(name)
        if info.shape != tuple(old.shape):
            raise CheckpointError(
                f"{info.file}: tensor {printable(name)} has shape {list(info.shape)}, but the "
                f"module has {list(old.shape)}."
            )
        fits = info.dtype in SCALE_DTYPES if old.is_floating_point() else info.dtype == old.dtype
        if not fits:
            wanted = "F32, F16 or BF16" if old.is_floating_point() else DTYPE_NAMES.get(old.dtype)
            raise CheckpointError(
                f"{info.file}: tensor {printable(name)} is {DTYPE_NAMES[info.dtype]}, not {wanted}."
            )

    def _resolve_missing(self) -> None:
        """Tensors that the file lacks: shared with one that it has, or a tied head, or an error."""
        filled = {id(slot.old) for slot in self.dense}
        for slot in self.missing:
            if id(slot.old) in filled:
                continue
            table = self._table_of_head(slot.owner) if slot.key == "weight" else None
            if table is None:
                self.checkpoint.info(slot.name)  # raises
            else:
                self.heads[slot.owner] = table

    def _table_of_head(self, head: nn.Module) -> nn.Module | None:
        """The embedding that a linear layer shares, or would if its maker had known of the tie.

        Configs often do not say whether the head is tied; the absence of its tensors does, unless
        the config says in so many words that the head is not.
        """
        if not isinstance(head, nn.Linear | Q4Linear) or head.bias is not None:
            return None
        tables = [
            part
            for part in self.places
            if isinstance(part, _TABLES) and _is_matrix(part) and _size(part) == _size(head)
        ]
        shared = [table for table in tables if table.weight is head.weight]
        if shared:
            return shared[0]
        if self.checkpoint.config.raw.get("tie_word_embeddings") is False or len(tables) != 1:
            return None
        called_head = any(name.rpartition(".")[2] == "lm_head" for name in self.places[head])
        return tables[0] if called_head else None


def _fill(
    plan: _Plan, tensor_of: Callable[[str], Tensor], device: torch.device, precision: str | None
) -> None:
    """Carries the plan out with the tensors on ``device`` that ``tensor_of`` gives."""
    made: dict[nn.Module, nn.Module] = {
        item.old: _packed_module(item, tensor_of, precision) for item in plan.packed
    }
    filled: dict[int, Tensor] = {}
    for slot in plan.dense:
        tensor = tensor_of(slot.name)
        if isinstance(slot.old, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=slot.old.requires_grad)
        filled[id(slot)] = tensor
        filled.setdefault(id(slot.old), tensor)
    # All tensors are there: from here on nothing fails, and the module changes.
    for slot in plan.dense:
        _set_tensor(slot.owner, slot.key, filled[id(slot)])
    for slot in plan.missing:
        if id(slot.old) in filled:
            _set_tensor(slot.owner, slot.key, filled[id(slot.old)])
    for part, key, tensor in plan.computed:
        _set_tensor(part, key, tensor.to(device))
    for head, table in plan.heads.items():
        packed = made.get(table)
        if isinstance(packed, Q4Embedding):
            made[head] = TiedHead(packed)
        else:
            head._parameters["weight"] = table._parameters["weight"]
    for old, new in made.items():
        new.train(old.training)
        for name in plan.places[old]:
            parent, _, child = name.rpartition(".")
            setattr(plan.module.get_submodule(parent), child, new)
    for part in plan.places:  # heads from an earlier call follow their table
        if isinstance(part, TiedHead) and isinstance(
            moved := made.get(part.embedding), Q4Embedding
        ):
            part._embedding = (moved,)
    _note_untied(plan)


def _packed_module(
    item: _Packed, tensor_of: Callable[[str], Tensor], precision: str | None
) -> Q4Linear | Q4Embedding:
    options: dict[str, Any] = {
        "group_size": item.params.group_size,
        "bits": item.params.bits,
        "mode": item.params.mode,
    }
    if precision is not None:
        options["precision"] = precision
    weight, scales, biases = (tensor_of(item.path + key) for key in _PACKED_KEYS)
    if isinstance(item.old, _TABLES):
        dtype = getattr(item.old, "dtype", None)
        return Q4Embedding.from_tensors(weight, scales, biases, dtype=dtype, **options)
    old_bias = getattr(item.old, "bias", None)
    bias = None
    if old_bias is not None:
        bias = nn.Parameter(tensor_of(f"{item.path}bias"), requires_grad=old_bias.requires_grad)
    return Q4Linear.from_tensors(weight, scales, biases, bias, **options)


def _set_tensor(owner: nn.Module, key: str, tensor: Tensor) -> None:
    place = owner._parameters if key in owner._parameters else owner._buffers
    place[key] = tensor  # type: ignore[assignment]


def _note_untied(plan: _Plan) -> None:
    """Keeps transformers from tying a head again that the checkpoint has tensors for."""
    names = [item.path for item in plan.packed] + [slot.name for slot in plan.dense]
    config = getattr(plan.module, "config", None)
    untied = any("lm_head" in name.split(".") for name in names)
    if untied and config is not None and getattr(config, "tie_word_embeddings", False) is True:
        config.tie_word_embeddings = False


def _computed_buffers(name: str, part: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Values of meta buffers that no checkpoint holds, such as ``inv_freq`` of rotary embeddings.

    In transformers they are functions of the config: a new module of the same class has them.
    """
    keys = [key for key in part._non_persistent_buffers_set if getattr(part, key).is_meta]
    if not keys:
        return []
    make: Callable[[Any], nn.Module] = type(part)
    try:
        buffers = dict(make(part.config).named_buffers(recurse=False))
        return [(part, key, buffers[key]) for key in keys]
    except Exception as error:
        raise CheckpointError(
            f"buffer {keys[0]} of {name or type(part).__name__} is on the meta device and cannot "
            f"be recomputed ({type(error).__name__}); make that module on the CPU."
        ) from error


def _own_tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What ``state_dict`` has of a module itself, without its children."""
    for key, parameter in part._parameters.items():
        if parameter is not None:
            yield key, parameter
    for key, buffer in part._buffers.items():
        if buffer is not None and key not in part._non_persistent_buffers_set:
            yield key, buffer


def _is_matrix(part: nn.Module) -> bool:
    """Plain layers, and subclasses that say they use ``weight`` as their base does (``packable``).

    Other subclasses may read ``weight`` themselves, which a packed layer does not have.
    """
    return type(part) in _MATRICES or (
        isinstance(part, _MATRICES) and getattr(part, "packable", False)
    )


def _size(part: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear layer or a table."""
    keys = (
        ("num_embeddings", "embedding_dim")
        if isinstance(part, _TABLES)
        else ("out_features", "in_features")
    )
    rows, columns = (getattr(part, key) for key in keys)
    return rows, columns
