"""A GGUF model, in one file or split into several, read with the ``gguf`` library.

Only headers are read; tensor data stays memory-mapped.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf import GGUFReader
from gguf.gguf_reader import ReaderTensor

from .errors import CheckpointError

T = TypeVar("T")


class _BoundedReader(GGUFReader):
    """gguf's reader, which would take what lies beyond the end of the file for empty arrays."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **options: Any) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > self.data.size:
            raise ValueError(f"byte {end} is asked for and the file ends at {self.data.size}")
        return super()._get(int(offset), dtype, count, *args, **options)


class GgufFile:
    """Metadata and tensors of a GGUF model. ``tensors`` maps names to gguf's ``ReaderTensor``."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when a file is missing, damaged or of another byte order."""
        self.path = path
        first = _read(path)
        self._fields: Mapping[str, Any] = first.fields
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in first.tensors}
        count = self.get("split.count", int, 1)
        for number in range(2, count + 1):
            part = _read(_split_path(path, number, count))
            self.tensors.update((tensor.name, tensor) for tensor in part.tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def value(self, key: str) -> Any:
        """The metadata value of ``key``, None if there is none."""
        field = self._fields.get(key)
        try:
            return None if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {key} is damaged: {error}.") from error

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of ``key`` as ``kind``; without a default a missing key is an error."""
        value = self.value(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.path} lacks {key}: it is no complete model file.")
            return default
        if kind is float and isinstance(value, (int, float)):
            # The shortest number that is this float32: 1e-05 and not 9.999999747378752e-06.
            return float(str(np.float32(value)))  # type: ignore[return-value]
        if not isinstance(value, kind):
            raise CheckpointError(
                f"{self.path}: {key} is {printable(value)} where a {kind.__name__} belongs."
            )
        return value

    def find(self, key: str, kind: type[T]) -> T | None:
        """The value of ``key`` as ``kind``, or None if there is none."""
        return self.get(key, kind) if key in self._fields else None


def printable(value: object) -> str:
    """What a file says, fit for one line of a terminal: files come from strangers."""
    text = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(value)
    )
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read(path: Path) -> _BoundedReader:
    try:
        reader = _BoundedReader(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, RecursionError) as error:
        # These are what gguf's parser raises when counts, lengths or names make no sense.
        raise CheckpointError(
            f"{path} is no GGUF file, or is damaged or cut short: {printable(error)}."
        ) from error
    if reader.byte_order != "I":
        raise CheckpointError(f"{path} has the other byte order: get its little-endian version.")
    return reader


def _split_path(first: Path, number: int, count: int) -> Path:
    """The file of part ``number``, next to part 1: ``NAME-00001-of-00003.gguf``."""
    marker = f"-00001-of-{count:05d}.gguf"
    if not first.name.endswith(marker):
        raise CheckpointError(
            f"{first.name} is one of {count} parts: name the first, which ends with {marker}."
        )
    path = first.with_name(first.name.removesuffix(marker) + f"-{number:05d}-of-{count:05d}.gguf")
    if not path.is_file():
        raise CheckpointError(f"part {number} of {count} is missing: {path} does not exist.")
    return path
