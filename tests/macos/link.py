"""Compiles and links the extension for Apple silicon without a Mac: ``make test-macos-link``.

setup.py itself runs as if on a Mac (darwin_build.py), against the macOS wheel of the torch that
scripts/setup.sh pins and against the newest one. Then every symbol must be one that torch, the
system or Python has, and every Objective-C message one that pyobjc's metadata of Metal knows: the
stub headers are ours, that list is not. Downloads and objects are kept in build/macos.
"""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import cross_compiler
from macho import MachO

ROOT, BUILD = cross_compiler.ROOT, cross_compiler.BUILD
WHEELS = BUILD / "wheels"
# Of NSObject and NSString, which are Foundation's; Metal's metadata has only Metal.
FOUNDATION = {"UTF8String", "alloc", "init", "new", "respondsToSelector:", "stringWithUTF8String:"}
_FOUNDATION_PROPERTIES = {"localizedDescription", "error", "status", "name"}


class LinkError(RuntimeError):
    """The extension would not build or load on a Mac; the message is one sentence."""


def download(requirement: str) -> Path:
    """The macOS wheel of ``requirement``, fetched if it is not there yet."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    platforms = [f"--platform=macosx_{v}" for v in ("14_0_arm64", "11_0_arm64", "10_9_universal2")]
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "download", requirement,
        *platforms, f"--python-version={version}", "--no-deps", "--only-binary=:all:",
        f"--dest={WHEELS}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.findall(r"(?:Saved|already downloaded) (\S+\.whl)", result.stdout)
    if result.returncode or not found:
        raise LinkError(f"the macOS wheel of {requirement} could not be fetched: {result.stderr}")
    return WHEELS / Path(found[-1]).name


def unpacked_torch(wheel: Path) -> Path:
    """Headers and libraries of a torch wheel."""
    folder = BUILD / wheel.name.split("-cp")[0]
    if not (folder / "complete").exists():
        with zipfile.ZipFile(wheel) as archive:
            wanted = re.compile(r"torch/(include/|lib/[^/]*\.dylib)")
            archive.extractall(folder, [n for n in archive.namelist() if wanted.match(n)])
        (folder / "complete").touch()
    return folder / "torch"


def build(torch: Path) -> Path:
    """The extension, built by setup.py against ``torch``."""
    compiler = BUILD / "bin" / "c++"
    cross_compiler.write_script(compiler)
    folder = BUILD / f"linked-{torch.parent.name}"
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests/macos/darwin_build.py"), str(torch), str(folder)],
        env=cross_compiler.environment() | {"CXX": str(compiler)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        raise LinkError(f"setup.py fails against {torch.parent.name}:\n{result.stdout[-6000:]}")
    (linked,) = (folder / "lib" / "torch_q4metal").glob("_C.*.so")
    return linked


def check_symbols(linked: MachO) -> int:
    """How many symbols were checked. The linker leaves open only what Python has."""
    loose = [s.name for s in linked.undefined() if s.library is None]
    strangers = [name for name in loose if not name.startswith(("_Py", "__Py"))]
    if strangers:
        raise LinkError(f"no library has the symbols {', '.join(sorted(strangers)[:10])}")
    return len(linked.undefined())


def check_selectors(linked: MachO, metadata: str) -> int:
    """How many Objective-C messages were checked against pyobjc's ``Metal/_metadata.py``."""
    known = set(re.findall(r'b"([A-Za-z_:0-9]+)"', metadata)) | FOUNDATION
    known |= _FOUNDATION_PROPERTIES | {p for m in known if (p := _property(m))}
    strangers = linked.selectors() - known
    if strangers:
        raise LinkError(f"Metal knows no message {', '.join(sorted(strangers))}")
    return len(linked.selectors())


def _property(setter: str) -> str | None:
    match = re.fullmatch(r"set([A-Z])(\w*):", setter)
    return match and match[1].lower() + match[2]


def main() -> None:
    """A line for each torch; a sentence and exit status 1 where something would not build."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    pinned = re.search(r"^TORCH=(\S+)", (ROOT / "scripts/setup.sh").read_text(), re.MULTILINE)
    assert pinned
    with zipfile.ZipFile(download("pyobjc-framework-Metal")) as archive:
        metadata = archive.read("Metal/_metadata.py").decode()
    for requirement in (f"torch=={pinned[1]}", "torch"):
        wheel = download(requirement)
        linked = MachO(build(unpacked_torch(wheel)))
        symbols, selectors = check_symbols(linked), check_selectors(linked, metadata)
        print(f"{wheel.name}: linked; {symbols} symbols and {selectors} messages exist", flush=True)


if __name__ == "__main__":
    try:
        main()
    except LinkError as error:
        sys.exit(f"error: {error}")
