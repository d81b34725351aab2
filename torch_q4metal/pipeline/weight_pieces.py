"""The tensors of a checkpoint in pieces that travel and are cached as wholes: a layer, a table.

A piece is the bytes of its tensors, sorted by name, each at a multiple of 64. Its SHA-256 is its
name in the cache, so another split of the same model, or a model that shares a table with it, finds
there what it needs. Pieces do not depend on how the checkpoint is cut into files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from ..environment import CACHE
from ..errors import CheckpointError
from ..safetensors_header import TensorInfo

CHUNK_BYTES = 1 << 20
"""What is read, sent and checked at a time, and what a broken connection can lose."""
_ALIGN = 64  # of the widest SIMD loads
_SHA256 = re.compile("[0-9a-f]{64}")
_OWN = re.compile(r"[0-9a-f]{64}(\.partial|\.model)?")  # what the cache's folder holds
_GROUP = re.compile(r"model\.layers\.\d+|model\.[^.]+|[^.]+")


@dataclass(frozen=True)
class Piece:
    """Some tensors of a checkpoint, in the order in which their bytes follow each other."""

    infos: tuple[TensorInfo, ...]

    @property
    def offsets(self) -> list[int]:
        """Where each tensor begins in the piece."""
        offsets, end = [], 0
        for info in self.infos:
            offsets.append(-(-end // _ALIGN) * _ALIGN)
            end = offsets[-1] + info.nbytes
        return offsets

    @property
    def size(self) -> int:
        return self.offsets[-1] + self.infos[-1].nbytes

    def read(self, begin: int, view: memoryview) -> None:
        """Fills ``view`` with the bytes of the piece from ``begin`` on.

        Raises CheckpointError if a file cannot be read.
        """
        view[:] = bytes(len(view))  # the gaps
        end = begin + len(view)
        for info, offset in zip(self.infos, self.offsets, strict=True):
            low, high = max(begin, offset), min(end, offset + info.nbytes)
            if low < high:
                _read(info.file, info.begin + low - offset, view[low - begin : high - begin])

    def sha256(self) -> str:
        """Reads all of it."""
        digest, buffer, size = hashlib.sha256(), bytearray(CHUNK_BYTES), self.size
        for begin in range(0, size, CHUNK_BYTES):
            view = memoryview(buffer)[: min(CHUNK_BYTES, size - begin)]
            self.read(begin, view)
            digest.update(view)
        return digest.hexdigest()

    def moved_to(self, file: Path) -> list[TensorInfo]:
        """The same tensors in a file that holds the piece and nothing else."""
        return [
            TensorInfo(info.name, info.dtype, info.shape, file, offset, offset + info.nbytes)
            for info, offset in zip(self.infos, self.offsets, strict=True)
        ]


def cut_into_pieces(infos: Iterable[TensorInfo]) -> list[Piece]:
    """The tensors of each layer, of each table, of each norm: a piece each, in order of names."""
    groups: dict[str, list[TensorInfo]] = {}
    for info in sorted(infos, key=lambda info: info.name):
        match = _GROUP.match(info.name)
        groups.setdefault(match[0] if match else "", []).append(info)
    return [Piece(tuple(group)) for _, group in sorted(groups.items())]


def _read(file: Path, begin: int, view: memoryview) -> None:
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(begin)
            while view:
                count = stream.readinto(view)
                if not count:
                    raise CheckpointError(f"{file} became shorter while it was being sent.")
                view = view[count:]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from None


class PieceCache:
    """Pieces that came from another machine, in the package's cache folder, each under its SHA-256.

    A piece grows at ``<sha256>.partial`` and takes its name when all of it is there, is checked and
    is on the disk; what has the name is whole. Its time of change is when it was used last.
    """

    def __init__(self) -> None:
        base = Path(CACHE.get() or platformdirs.user_cache_path("torch_q4metal"))
        self.folder = base / "streamed"

    def file(self, sha256: str) -> Path:
        """Where a piece is, or will be. Raises CheckpointError for what is no SHA-256."""
        if not _SHA256.fullmatch(sha256):
            raise CheckpointError(f"{sha256[:80]!r} is no SHA-256 of a piece of a model.")
        return self.folder / sha256

    def has(self, sha256: str, size: int) -> bool:
        """Whether the whole piece is there. One of another size was tampered with, and goes."""
        file = self.file(sha256)
        if not file.is_file():
            return False
        if file.stat().st_size != size:
            file.unlink()
            return False
        with contextlib.suppress(OSError):  # a cache that may only be read
            os.utime(file)
        return True

    def used(self, days: float = 0.0) -> tuple[int, int]:
        """(files, bytes) that are there, of those that nobody has used for so many days."""
        sizes = [entry.stat().st_size for entry in self._unused(days)]
        return len(sizes), sum(sizes)

    def remove(self, days: float) -> tuple[int, int]:
        """Removes what ``used`` counts, but nothing that is being received, and says how much.

        A rank that has it loaded keeps it until it ends. Raises CheckpointError.
        """
        files = size = 0
        for file in self._unused(days):
            try:
                with file.open("rb") as stream:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    size, files = size + file.stat().st_size, files + 1
                    file.unlink()
                if file.parent != self.folder and not any(file.parent.iterdir()):
                    file.parent.rmdir()
            except BlockingIOError:
                continue
            except OSError as error:
                raise CheckpointError(
                    f"{file} cannot be removed: {error.strerror or error}."
                ) from None
        return files, size

    def _unused(self, days: float) -> list[Path]:
        """Files whose last use was longer ago; names that are none of ours stay."""
        before = time.time() - days * 86400
        pieces = [path for path in self.folder.glob("*") if _OWN.fullmatch(path.name)]
        files = [f for path in pieces for f in ([path] if path.is_file() else path.glob("*"))]
        return [file for file in files if file.is_file() and file.stat().st_mtime <= before]

    def write_texts(self, name: str, texts: dict[str, str]) -> Path:
        """A folder in the cache with these files. Raises CheckpointError."""
        folder = self.folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file, text in texts.items():
                own = folder / f"{os.getpid()}.partial"  # ranks of one machine write the same
                own.write_text(text, encoding="utf-8")
                os.replace(own, folder / Path(file).name)
        except OSError as error:
            raise _unwritable(folder, error) from None
        return folder

    def require_space(self, needed: int) -> None:
        """Raises CheckpointError if ``needed`` more bytes do not fit on the disk."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise _unwritable(self.folder, error) from None
        if needed > free:
            raise CheckpointError(
                f"{needed / 1e9:.2f} GB of weights are to come into {self.folder}, where "
                f"{free / 1e9:.2f} GB are free; set {CACHE.name} to a folder on a larger disk."
            )


class PartialPiece:
    """A piece that is on its way into the cache. What an earlier run has of it is kept."""

    def __init__(self, cache: PieceCache, sha256: str, size: int) -> None:
        """Raises CheckpointError if it cannot be written, or another process writes it."""
        self.sha256, self.size = sha256, size
        self._target = cache.file(sha256)
        self._file = self._target.with_name(f"{sha256}.partial")
        try:
            self._stream = self._file.open("ab")
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another process receives the same weights into {self._file}; wait until it is "
                f"done, or set {CACHE.name} to another folder."
            ) from None
        except OSError as error:
            raise _unwritable(self._file, error) from None
        self.length = self._stream.seek(0, os.SEEK_END)
        if self.length > size:
            self._restart()

    def append(self, data: memoryview) -> None:
        """Adds bytes that were checked. Raises CheckpointError if the disk takes no more."""
        try:
            self._stream.write(data)
            self._stream.flush()
        except OSError as error:
            raise _unwritable(self._file, error) from None
        self.length += len(data)

    def finish(self) -> bool:
        """Gives it its name, if it is what it should be; else it is empty again."""
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            with self._file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != self.sha256:
                self._restart()
                return False
            os.replace(self._file, self._target)
        except OSError as error:
            raise _unwritable(self._file, error) from None
        self.close()
        return True

    def close(self) -> None:
        """Keeps what is there for the next run."""
        with contextlib.suppress(OSError):
            self._stream.close()

    def _restart(self) -> None:
        self._stream.truncate(0)
        self._stream.seek(0)
        self.length = 0


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written: {error.strerror or error}; make space or set {CACHE.name} to "
        "another folder, and run again: it goes on from there."
    )
