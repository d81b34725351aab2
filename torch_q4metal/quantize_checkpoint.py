"""Hugging Face checkpoint -> MLX checkpoint, with the numbers that ``mlx_lm.convert -q`` writes.

Every Linear and Embedding whose in_features are a multiple of the group size is quantized; the rest
is copied. config.json, the index and all tensors are equal to mlx-lm's, byte for byte. Knowingly
different: the order of tensors inside a file (``safetensors_writer``); tokenizer files are copied
as they are; ``tie_word_embeddings`` is written where without it mlx-lm would drop the head.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ops
from .checkpoint import Checkpoint
from .config import AFFINE_BITS, GROUP_SIZES, read_json
from .errors import CheckpointError, ConfigError
from .model_layout import ModelSizes, model_modules
from .safetensors_header import printable
from .safetensors_writer import SHARD_BYTES, ShardWriter, TensorSpec, packed_specs

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FAMILIES = ("llama", "qwen2")
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_PIECE_BYTES = 32 << 20  # source bytes converted at a time: what a conversion needs of memory
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "generation_config.json",
)  # fmt: skip


class QuantizedCheckpoint:
    """A Hugging Face checkpoint seen as an MLX checkpoint that is yet to be written.

    ``dtype`` (float32, float16 or bfloat16; None: the config's ``torch_dtype``, else that of each
    tensor) is the dtype of scales, biases and all that stays dense, and weights are rounded to it
    before they are quantized, as mlx-lm does.

    Raises CheckpointError or ConfigError naming the tensor or field for all that is missing,
    damaged or not built.
    """

    def __init__(
        self, source: Path, *, bits: int = 4, group_size: int = 64, dtype: str | None = None
    ) -> None:
        if bits not in AFFINE_BITS or group_size not in GROUP_SIZES:
            raise ConfigError(
                f"{bits} bits with group size {group_size} is no MLX format: bits are one of"
                f" {_listed(AFFINE_BITS)}, group sizes one of {_listed(GROUP_SIZES)}."
            )
        self.bits, self.group_size = bits, group_size
        _check_has_safetensors(source)
        self.source = Checkpoint.open(source)
        if self.source.config.quantization is not None:
            raise ConfigError(f"{source} is quantized already: convert the original model.")
        self._config = read_json(source / "config.json")
        self._dtype = DTYPES.get(dtype or str(self._config.get("torch_dtype")))
        self.sizes = _model_sizes(self.source, self._config)
        self._dense: list[str] = []
        self._packed: list[str] = []
        self.tensors = self._plan()
        _check_nothing_left(self.source, {*self._dense, *(f"{p}.weight" for p in self._packed)})

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of the converted checkpoint."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def write(
        self,
        folder: Path,
        progress: Callable[[int], None] | None = None,
        *,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Write the whole checkpoint into ``folder``; ``progress`` gets the size of each piece."""
        text = json.dumps(self._mlx_config(), indent=4)
        (folder / "config.json").write_text(text, encoding="utf-8")
        _copy_files(self.source.path, folder)
        with ShardWriter(folder, self.tensors, shard_bytes, progress) as writer:
            for name in self._dense:
                for begin, rows in self._pieces(name):
                    writer.write(name, _as_bytes(rows), begin * rows[0].nbytes)
            for path in self._packed:
                self._quantize(path, writer)

    def _plan(self) -> list[TensorSpec]:
        """Everything that will be written, in MLX's order, after a check of names and shapes."""
        tensors: list[TensorSpec] = []
        for module in model_modules(self.sizes):
            weight = f"{module.path}.weight"
            dtype = self._checked(weight, module.shape)
            if module.is_matrix and module.shape[1] % self.group_size == 0:
                self._packed.append(module.path)
                tensors += packed_specs(
                    module.path, *module.shape,
                    bits=self.bits, group_size=self.group_size, dtype=dtype,
                )  # fmt: skip
            else:
                self._dense.append(weight)
                tensors.append(TensorSpec(weight, dtype, module.shape))
            if module.bias:
                bias = f"{module.path}.bias"
                self._dense.append(bias)
                dtype = self._checked(bias, module.shape[:1])
                tensors.append(TensorSpec(bias, dtype, module.shape[:1]))
        return tensors

    def _checked(self, name: str, shape: tuple[int, ...]) -> str:
        """The safetensors dtype in which ``name`` will be written."""
        info = self.source.info(name)
        if info.dtype not in _NAMES:
            raise CheckpointError(
                f"{info.file}: {name} is {info.dtype}: only float32, float16 and bfloat16 can be"
                " converted."
            )
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: {name} has the shape {list(info.shape)} and config.json asks for"
                f" {list(shape)}."
            )
        return _NAMES[self._dtype or info.dtype]

    def _pieces(self, name: str) -> Any:
        """(first row, rows in the target dtype) of a tensor, a piece at a time."""
        tensor = self.source.tensor(name)
        step = max(1, _PIECE_BYTES // max(1, tensor[0].nbytes))
        for begin in range(0, tensor.shape[0], step):
            rows = tensor[begin : begin + step]
            yield begin, rows if self._dtype is None else rows.to(self._dtype)

    def _quantize(self, path: str, writer: ShardWriter) -> None:
        for begin, rows in self._pieces(f"{path}.weight"):
            triple = ops.quantize(rows, self.group_size, self.bits)
            for suffix, data in zip(("weight", "scales", "biases"), triple, strict=True):
                writer.write(f"{path}.{suffix}", _as_bytes(data), begin * data[0].nbytes)

    def _mlx_config(self) -> dict[str, Any]:
        """The source's config.json with the changes that mlx-lm makes, sorted."""
        dropped = ("_name_or_path", "vision_config")
        config = {key: value for key, value in self._config.items() if key not in dropped}
        generation = self.source.path / "generation_config.json"
        if generation.is_file() and (eos := read_json(generation).get("eos_token_id")):
            config["eos_token_id"] = eos
        if not self.sizes.tied:
            config.setdefault("tie_word_embeddings", False)
        quantization = {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}
        config["quantization"] = config["quantization_config"] = quantization
        return dict(sorted(config.items()))


def _check_has_safetensors(source: Path) -> None:
    if source.is_dir() and not any(source.glob("*.safetensors")):
        for pattern, advice in (
            ("*.gguf", "name that file"),
            ("*.bin", "only safetensors are read: save the model again with transformers"),
        ):
            for file in sorted(source.glob(pattern)):
                raise CheckpointError(f"{source} has {file.name} and no *.safetensors: {advice}.")


def _model_sizes(source: Checkpoint, config: dict[str, Any]) -> ModelSizes:
    family = source.config.model_type
    if family not in FAMILIES or "text_config" in config:
        raise ConfigError(
            f"{source.path}: the model type {config.get('model_type')!r} is not built:"
            f" {' and '.join(FAMILIES)} can be converted."
        )

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{source.path / 'config.json'}: {key} is {value!r}, not a number.")
        return value

    is_llama = family == "llama"
    heads = number("num_attention_heads")
    hidden = number("hidden_size")
    tied = config.get("tie_word_embeddings", not source.has("lm_head.weight"))
    attention_bias = bool(config.get("attention_bias")) and is_llama
    return ModelSizes(
        layers=number("num_hidden_layers"),
        hidden=hidden,
        intermediate=number("intermediate_size"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads) if is_llama else hidden // heads,
        vocab=number("vocab_size"),
        tied=bool(tied),
        qkv_bias=attention_bias or not is_llama,
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias")) and is_llama,
    )


def _check_nothing_left(source: Checkpoint, used: set[str]) -> None:
    # A tied head may be stored a second time; rotary frequencies follow from the config.
    left = [
        name
        for name in source.tensors
        if name not in used
        and name != "lm_head.weight"
        and not name.endswith("rotary_emb.inv_freq")
    ]
    if left:
        more = " ..." if len(left) > 5 else ""
        raise CheckpointError(
            f"{source.path} has tensors that the {source.config.model_type} family does not know:"
            f" {', '.join(map(printable, left[:5]))}{more}."
        )


def _copy_files(source: Path, folder: Path) -> None:
    """Tokenizer, chat templates and generation defaults, as they are."""
    for pattern in _COPIED:
        for file in source.glob(pattern):
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def _as_bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy()


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
