"""Kernel families as text inside the extension: csrc/metal/*.metal with their includes inlined."""

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"\s*$')
_ONCE = re.compile(r"^\s*#\s*pragma\s+once\s*$")


def families() -> list[str]:
    """Names of the kernel families: the .metal files, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.metal"))


def complete_text(family: str) -> str:
    """The family's file with each ``#include "file"`` line replaced, once a file, by its text.

    Includes in angle brackets are the Metal compiler's own and stay.
    """
    return _inlined((FOLDER / f"{family}.metal").resolve(), set())


def _inlined(path: Path, seen: set[Path]) -> str:
    seen.add(path)
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.isascii():
            raise ValueError(f"{path}:{number}: not ASCII, as which torch hands text to Metal")
        include = _INCLUDE.match(line)
        if include:
            inner = (path.parent / include[1]).resolve()
            lines.append("" if inner in seen else _inlined(inner, seen))
        elif not _ONCE.match(line):
            lines.append(line)
    return "".join(lines)


def write_source(path: Path) -> None:
    """Writes the C++ file that defines ``family_text`` of kernel_text.h, if it would change."""
    texts = [f'  if (family == "{name}")\n    return R"metal({complete_text(name)})metal";\n'
             for name in families()]  # fmt: skip
    header = Path("../" * (len(path.resolve().relative_to(FOLDER.parent.parent).parts) - 1))
    source = (
        f'#include "{(header / "csrc/metal/kernel_text.h").as_posix()}"\n\n'
        "namespace q4metal::mps {\n\n"
        "const char* family_text([[maybe_unused]] std::string_view family) {\n"
        + "".join(texts)
        + "  return nullptr;\n}\n\n} // namespace q4metal::mps\n"
    )
    # An unchanged file keeps its time stamp, so that it is not compiled again.
    if not path.exists() or path.read_text(encoding="utf-8") != source:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
