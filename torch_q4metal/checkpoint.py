"""A checkpoint directory: which tensors there are, how each is packed, and its bytes in place.

``Checkpoint.open`` reads headers only. ``tensor`` gives memory-mapped bytes without copying them: a
loaded model takes its file's size once, in pages that the system can drop and read again. The
mapping is private (copy on write), so nothing that is written to a tensor reaches the file. A file
may be deleted while tensors are alive; it must not be truncated.

MLX does not pad its headers, so in most of its files the packed words lie at odd addresses, where
no kernel may read them. Those are read into memory of their own instead: the same size, once.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .config import (
    AFFINE_BITS,
    GROUP_SIZES,
    LANGUAGE_MODEL,
    CheckpointConfig,
    QuantParams,
    read_checkpoint_config,
    read_json,
)
from .errors import CheckpointError, ConfigError
from .mapped_file import MappedBytes, byte_ranges, map_ranges, read_tensor
from .safetensors_header import DTYPE_NAMES, TensorInfo, printable, read_header

__all__ = ["Checkpoint", "TensorInfo"]

logger = logging.getLogger(__name__)

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.safetensors")


class Checkpoint:
    """The tensors of one model directory in MLX's layout (or a dense one of the same names).

    ``path``     the directory
    ``config``   what ``config.json`` and ``generation_config.json`` say
    ``tensors``  name -> TensorInfo. In a checkpoint whose text model lies under
                 ``language_model.``, the names come without this prefix, and what lies beside it
                 (a vision tower) is left out.
    """

    def __init__(
        self, path: Path, config: CheckpointConfig, tensors: Mapping[str, TensorInfo]
    ) -> None:
        self.path = path
        self.config = config
        self.tensors = tensors
        self._mappings: dict[Path, list[MappedBytes]] = {}
        self._warned: set[QuantParams] = set()

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Reads the config and every shard's header, and checks them.

        Raises ConfigError for the config and CheckpointError for everything about the weights; the
        message names the file or tensor.
        """
        path = Path(path)
        if not path.is_dir():
            state = "is a file" if path.exists() else "does not exist"
            raise CheckpointError(f"{path} {state}; a model is a directory with config.json in it.")
        config = read_checkpoint_config(path)
        tensors = _merge(path, [read_header(file) for file in _weight_files(path)])
        return cls(path, config, _language_model(tensors))

    def only(self, wanted: Callable[[str], bool]) -> Checkpoint:
        """The tensors with these names alone: of the files no other byte is mapped or read."""
        tensors = {name: info for name, info in self.tensors.items() if wanted(name)}
        return Checkpoint(self.path, self.config, tensors)

    def __getstate__(self) -> dict[str, object]:
        """Without the mappings: a copy of a model, which may hold its checkpoint, maps anew."""
        return {**self.__dict__, "_mappings": {}}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, which is what they take in memory."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def scales_dtype(self) -> torch.dtype:
        """Dtype of most ``scales``; in a dense checkpoint that of most floating-point tensors."""
        scales: Counter[torch.dtype] = Counter()
        dense: Counter[torch.dtype] = Counter()
        for name, info in self.tensors.items():
            if info.dtype in SCALE_DTYPES:
                (scales if name.endswith(".scales") else dense)[info.dtype] += 1
        counts = scales or dense
        return counts.most_common(1)[0][0] if counts else torch.float32

    def has(self, name: str) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """Raises CheckpointError, naming missing shards if there are any."""
        info = self.tensors.get(name)
        if info is None:
            missing = _missing_shards({t.file for t in self.tensors.values()})
            hint = f"; {missing[0]} is missing" if missing else ""
            raise CheckpointError(f"{self.path} has no tensor {printable(name)}{hint}.")
        return info

    def tensor(self, name: str) -> Tensor:
        """The tensor's mapped bytes with the file's dtype, on the CPU; uint32 comes as int32.

        Nothing is copied, except a dense tensor that does not begin at a multiple of its item
        size, which is read. (MLX does not pad headers, so that happens in three of four files; the
        kernels take packed tensors at any address.) Each tensor has a storage of its own: pickling
        one does not drag the file along.
        """
        info = self.info(name)
        dtype = info.loaded_dtype
        if info.numel == 0:
            return torch.empty(info.shape, dtype=dtype)
        if info.begin % dtype.itemsize and not self._is_packed(name):
            return read_tensor(info).view(dtype).view(info.shape)
        mapping = self._mapping(info)
        offset = info.begin - mapping.begin
        flat = torch.frombuffer(mapping.memory, dtype=dtype, count=info.numel, offset=offset)
        return flat.view(info.shape)

    def quant_params(self, path: str, in_features: int | None = None) -> QuantParams | None:
        """How the matrix at module path ``path`` is packed; None if it is dense.

        The shapes decide, as in mlx-lm. ``in_features`` is the module's own K; without it, shapes
        that allow several answers are settled by the config. Raises CheckpointError naming the
        tensor if the three tensors do not fit each other, ``in_features``, or the config's entry
        for this very module. Where only the config's default disagrees, a warning is logged.
        """
        quantization = self.config.quantization
        overrides = quantization.overrides if quantization else {}
        default = quantization.default if quantization else None
        shown = printable(path)
        if not self.has(f"{path}.scales"):
            weight = self.info(f"{path}.weight")
            if weight.dtype == torch.uint32:
                self.info(f"{path}.scales")
            if overrides.get(path) is not None:
                raise CheckpointError(
                    f"config.json says {overrides[path]} for {shown}, but {shown}.scales is "
                    f"in no file of {self.path}."
                )
            return None
        if path in overrides and overrides[path] is None:
            raise CheckpointError(
                f"config.json says that {shown} is not quantized, but {shown}.scales is in "
                f"{self.info(f'{path}.scales').file}."
            )
        weight, scales = self._packed_infos(path)
        explicit = overrides.get(path)
        fitting = _fitting_params(weight, scales, in_features)
        if explicit is not None:
            if explicit not in fitting:
                raise CheckpointError(
                    f"config.json says {explicit} for {shown}, but {_shapes(weight, scales)}"
                    f"{_for_features(in_features)}."
                )
            return explicit
        if default in fitting:
            return default
        if len(fitting) != 1:
            raise CheckpointError(
                f"{weight.file}: {_shapes(weight, scales)}{_for_features(in_features)}, which "
                f"{'fits several' if fitting else 'fits no'} bits and group sizes."
            )
        if default is not None and fitting[0] not in self._warned:
            self._warned.add(fitting[0])
            logger.warning(
                "%s: config.json says %s, but the shapes of %s say %s; the shapes are used",
                self.path, default, shown, fitting[0],
            )  # fmt: skip
        return fitting[0]

    def _packed_infos(self, path: str) -> tuple[TensorInfo, TensorInfo]:
        """weight and scales of a packed matrix, after all that is checked without K."""
        weight, scales = (self.info(f"{path}.{part}") for part in ("weight", "scales"))
        if scales.dtype == torch.uint8:
            raise CheckpointError(
                f"{scales.file}: tensor {printable(scales.name)} is U8, as in the mxfp4, nvfp4 and "
                "mxfp8 modes, which are not built yet; take an affine checkpoint."
            )
        biases = self.info(f"{path}.biases")
        _require(weight, (torch.uint32, torch.int32), "U32 packed weights")
        _require(scales, SCALE_DTYPES, "F32, F16 or BF16 scales")
        _require(biases, SCALE_DTYPES, "F32, F16 or BF16 biases")
        if len(weight.shape) != 2 or len(scales.shape) != 2 or weight.shape[0] != scales.shape[0]:
            raise CheckpointError(
                f"{weight.file}: {_shapes(weight, scales)}, but both must be matrices of equally "
                "many rows."
            )
        if biases.shape != scales.shape or biases.dtype != scales.dtype:
            raise CheckpointError(
                f"{biases.file}: tensor {printable(biases.name)} is {_described(biases)}, but its "
                f"scales are {_described(scales)}."
            )
        return weight, scales

    def _is_packed(self, name: str) -> bool:
        path, _, key = name.rpartition(".")
        return key in ("weight", "scales", "biases") and self.has(f"{path}.scales")

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the files that are mapped so far."""
        return sum(len(part.memory) for parts in self._mappings.values() for part in parts)

    def _mapping(self, info: TensorInfo) -> MappedBytes:
        """The mapping that the tensor lies in. A file's are made together, at the first need."""
        file = info.file
        if file not in self._mappings:
            ranges = byte_ranges(t for t in self.tensors.values() if t.file == file)
            self._mappings[file] = map_ranges(file, ranges)
        return next(part for part in self._mappings[file] if info.end <= part.end)


def _weight_files(path: Path) -> list[Path]:
    """``model*.safetensors``, or the ``weights*.safetensors`` of old checkpoints.

    The index is no guide: many repositories carry one that names shards which do not exist.
    """
    for pattern in ("model*.safetensors", "weights*.safetensors"):
        if files := sorted(file for file in path.glob(pattern) if file.is_file()):
            return files
    if (path / "weights.npz").exists():
        raise CheckpointError(
            f"{path / 'weights.npz'} is the format of 2023, which is not read; take a newer "
            "checkpoint of this model, with model.safetensors."
        )
    raise CheckpointError(
        f"{path} holds no model*.safetensors; GGUF files and other checkpoints are converted with "
        "python -m torch_q4metal.convert."
    )


def _merge(path: Path, shards: list[dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """One map of all shards. Of a tensor in two files, the one that the index names is taken."""
    tensors: dict[str, TensorInfo] = {}
    index: dict[str, object] | None = None
    for shard in shards:
        for name, info in shard.items():
            other = tensors.setdefault(name, info)
            if other is info:
                continue
            if index is None:
                index = _read_index(path)
            if index.get(name) == info.file.name:
                tensors[name] = info
            elif index.get(name) != other.file.name:
                raise CheckpointError(
                    f"tensor {printable(name)} is in {other.file} and in {info.file.name}; remove "
                    "the file that does not belong to this model."
                )
    return tensors


def _read_index(path: Path) -> dict[str, object]:
    try:
        weight_map = read_json(path / "model.safetensors.index.json").get("weight_map")
    except ConfigError:
        return {}
    return weight_map if isinstance(weight_map, dict) else {}


def _language_model(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    inside = {
        name.removeprefix(LANGUAGE_MODEL): info
        for name, info in tensors.items()
        if name.startswith(LANGUAGE_MODEL)
    }
    if not inside:
        return tensors
    outside = {name.split(".")[0] for name in tensors if not name.startswith(LANGUAGE_MODEL)}
    if outside:
        logger.warning("only the language model is read, not %s", ", ".join(sorted(outside)))
    return inside


def _missing_shards(files: set[Path]) -> list[str]:
    """Names of shards that the names of the others promise (``model-00001-of-00003``)."""
    missing: list[str] = []
    sets = {(match[1], match[2]) for file in files if (match := _SHARD.fullmatch(file.name))}
    directory = next(iter(files)).parent if files else Path()
    for stem, count in sorted(sets):
        names = (f"{stem}-{i:05d}-of-{count}.safetensors" for i in range(1, int(count) + 1))
        missing += [name for name in names if not (directory / name).exists()]
    return missing


def _fitting_params(
    weight: TensorInfo, scales: TensorInfo, in_features: int | None
) -> list[QuantParams]:
    """All (bits, group size) for which both shapes describe the same K (or ``in_features``)."""
    words, groups = weight.shape[1], scales.shape[1]
    return [
        QuantParams(bits, group_size)
        for bits in AFFINE_BITS
        for group_size in GROUP_SIZES
        if words * 32 == groups * group_size * bits
        and (in_features is None or groups * group_size == in_features)
    ]


def _require(info: TensorInfo, dtypes: tuple[torch.dtype, ...], wanted: str) -> None:
    if info.dtype not in dtypes:
        raise CheckpointError(
            f"{info.file}: tensor {printable(info.name)} is {_described(info)} where {wanted} were "
            "expected."
        )


def _described(info: TensorInfo) -> str:
    return f"{DTYPE_NAMES[info.dtype]} {list(info.shape)}"


def _shapes(weight: TensorInfo, scales: TensorInfo) -> str:
    return (
        f"{printable(weight.name)} is {list(weight.shape)} and {printable(scales.name)} is "
        f"{list(scales.shape)}"
    )


def _for_features(in_features: int | None) -> str:
    return "" if in_features is None else f" for {in_features} input features"
