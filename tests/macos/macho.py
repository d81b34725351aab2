"""Just enough of the Mach-O format to check a linked library: its undefined symbols, its names."""

import struct
from collections.abc import Iterator
from pathlib import Path

_MAGIC = 0xFEEDFACF  # 64 bits, little-endian
_SEGMENT_64, _SYMTAB, _LOAD_DYLIB, _REEXPORT_DYLIB = 0x19, 0x2, 0xC, 0x8000001F
_EXTERNAL, _TYPE_MASK, _UNDEFINED = 0x01, 0x0E, 0x00


class MachO:
    """A thin 64-bit Mach-O file. Raises ValueError for anything else."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        magic, _, _, _, commands, _, _, _ = struct.unpack_from("<8I", self._data)
        if magic != _MAGIC:
            raise ValueError(f"{path} is not a 64-bit Mach-O file")
        self.libraries: list[str] = []
        self._sections: dict[str, tuple[int, int]] = {}
        self._symtab = (0, 0, 0)
        position = 32
        for _ in range(commands):
            kind, size = struct.unpack_from("<2I", self._data, position)
            if kind == _SEGMENT_64:
                self._read_sections(position)
            elif kind == _SYMTAB:
                self._symtab = struct.unpack_from("<3I", self._data, position + 8)
            elif kind in (_LOAD_DYLIB, _REEXPORT_DYLIB):
                (name,) = struct.unpack_from("<I", self._data, position + 8)
                self.libraries.append(self._string(position + name))
            position += size

    def _read_sections(self, position: int) -> None:
        (count,) = struct.unpack_from("<I", self._data, position + 64)
        for i in range(count):
            at = position + 72 + 80 * i
            name = self._data[at : at + 16].rstrip(b"\0").decode()
            _, size, offset = struct.unpack_from("<QQI", self._data, at + 32)
            self._sections[name] = (offset, size)

    def _string(self, position: int) -> str:
        return self._data[position : self._data.index(b"\0", position)].decode()

    def selectors(self) -> set[str]:
        """Objective-C messages that the code sends."""
        offset, size = self._sections.get("__objc_methname", (0, 0))
        return {s.decode() for s in self._data[offset : offset + size].split(b"\0") if s}

    def undefined(self) -> dict[str, str | None]:
        """Symbols that others must have, with the library that the linker found (None: in any)."""
        libraries = dict(enumerate(self.libraries, start=1))
        return {
            name: libraries.get(ordinal)
            for name, kind, ordinal in self._symbols()
            if kind == _UNDEFINED
        }

    def exported(self) -> set[str]:
        """Symbols that others may use."""
        return {name for name, kind, _ in self._symbols() if kind != _UNDEFINED}

    def _symbols(self) -> Iterator[tuple[str, int, int]]:
        start, count, strings = self._symtab
        entries = memoryview(self._data)[start : start + 16 * count]
        for name, kind, _, note, _ in struct.iter_unpack("<IBBHQ", entries):
            if kind & _EXTERNAL:
                yield self._string(strings + name), kind & _TYPE_MASK, note >> 8
