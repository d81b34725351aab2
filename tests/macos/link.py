"""Compiles and links the extension for Apple silicon without a Mac: ``make test-macos-link``.

setup.py itself runs as if on a Mac (darwin_build.py), against the macOS wheel of the torch that
scripts/setup.sh pins and against the newest one. Then every symbol must be one that torch, the
system or Python has, and every Objective-C message one that pyobjc or metal-cpp knows: the stub
headers are ours, those lists are not. And safetensors' macOS wheel has to hold what weights are
loaded with. Downloads and objects are kept in build/macos.
"""

import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import cross_compiler
from macho import MachO

ROOT, BUILD = cross_compiler.ROOT, cross_compiler.BUILD
WHEELS = BUILD / "wheels"
PRIVATE_NAMES = ("_mps_maxBufferLength",)
# Messages of safetensors' functions that read into memory of the GPU; elsewhere it copies.
SAFETENSORS_TEXTS = ("MTLBuffer alloc for slice", "pread for slice")


class LinkError(RuntimeError):
    """The extension would not build or load on a Mac; the message is one sentence."""


def download(requirement: str) -> Path:
    """The macOS wheel of ``requirement``, fetched if it is not there yet."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    platforms = [f"--platform=macosx_{v}" for v in ("14_0_arm64", "11_0_arm64", "10_9_universal2")]
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "download", requirement,
        *platforms, f"--python-version={python}", "--no-deps", "--only-binary=:all:",
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
        said = re.findall(r"^(?:.*error: .*|.*Error: .*)$", result.stdout, re.MULTILINE)
        raise LinkError(f"setup.py fails against {torch.parent.name}:\n" + "\n".join(said[:20]))
    (linked,) = (folder / "lib" / "torch_q4metal").glob("_C.*.so")
    return linked


def check_symbols(linked: MachO, torch: Path) -> int:
    """How many symbols were checked.

    A Mac's Python is not linked but found when the extension loads, so the linker leaves open
    whatever no library has; here that must be Python's and nothing else.
    """
    needed = linked.undefined()
    system = {name for name, library in needed.items() if library and library.startswith("/")}
    python = {name for name in needed if name.startswith(("_Py", "__Py"))}
    open_ = set(needed) - system - python
    for library in sorted((torch / "lib").glob("libtorch*.dylib")) + [torch / "lib/libc10.dylib"]:
        open_ -= MachO(library).exported()
    if open_:
        raise LinkError(f"no library has the symbols {', '.join(sorted(open_)[:10])}")
    return len(needed)


def check_memory_management(linked: MachO) -> None:
    """That nothing was compiled with ARC, which releases what torch owns (csrc/metal/library.h)."""
    words = ("_objc_retain", "_objc_release", "_objc_storeStrong")
    if found := sorted(name for name in linked.undefined() if name.startswith(words)):
        raise LinkError(f"the extension was compiled with ARC: it needs {', '.join(found)}")


def check_private_names(torch: Path) -> None:
    """That torch on a Mac has what Python code takes of ``torch._C``, which promises nothing."""
    content = (torch / "lib/libtorch_python.dylib").read_bytes()
    missing = [name for name in PRIVATE_NAMES if b"\0%s\0" % name.encode() not in content]
    if missing:
        raise LinkError(f"torch._C has no {', '.join(missing)}")


def check_safetensors(wheel: Path) -> None:
    """That this safetensors, on a Mac, reads tensors and slices to where the GPU does."""
    with zipfile.ZipFile(wheel) as archive:
        library = next(name for name in archive.namelist() if name.endswith(".so"))
        content = archive.read(library)
    missing = [text for text in SAFETENSORS_TEXTS if text.encode() not in content]
    if missing:
        raise LinkError(f"{wheel.name} does not read into GPU memory: no {', '.join(missing)}")


def known_messages(pyobjc: Path, mlx: Path) -> set[str]:
    """Objective-C messages that two independent lists have: pyobjc's metadata and metal-cpp."""
    with zipfile.ZipFile(pyobjc) as archive:
        metadata = archive.read("Metal/_metadata.py").decode()
    known = set(re.findall(r'b"([A-Za-z_:0-9]+)"', metadata))
    with zipfile.ZipFile(mlx) as archive:
        for name in archive.namelist():
            if "metal_cpp/" in name and name.endswith(".hpp"):
                text = archive.read(name).decode(errors="replace")
                known |= set(re.findall(r'PRIVATE_DEF_SEL\(\s*\w+,\s*"([^"]+)"\)', text))
    return known


def check_messages(linked: MachO, known: set[str]) -> int:
    """How many Objective-C messages were checked."""
    strangers = linked.selectors() - known
    if strangers:
        raise LinkError(f"Metal and Foundation know no message {', '.join(sorted(strangers))}")
    return len(linked.selectors())


def check_constants(pyobjc: Path) -> int:
    """How many enumerators of the stub headers were checked against pyobjc's values."""
    with zipfile.ZipFile(pyobjc) as archive:
        metadata = archive.read("Metal/_metadata.py").decode()
    stub = cross_compiler.STUBS / "Metal.framework/Headers/Metal.h"
    found = re.findall(r"^  (MTL\w+) = ([^,]+),$", stub.read_text(), re.MULTILINE)
    for name, value in found:
        number = eval(value, {"__builtins__": {}})  # an integer expression of our own header
        if f"${name}@{number}$" not in metadata:
            raise LinkError(f"{name} is not {number} in Metal; correct the stub header")
    return len(found)


def main() -> None:
    """A line for each torch; a sentence and exit status 1 where something would not build."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    pinned = re.search(r"^TORCH=(\S+)", (ROOT / "scripts/setup.sh").read_text(), re.MULTILINE)
    assert pinned
    pyobjc = download("pyobjc-framework-Metal")
    messages = known_messages(pyobjc, download("mlx-metal"))
    print(f"stub headers: {check_constants(pyobjc)} constants have Metal's values", flush=True)
    shards = download(f"safetensors=={version('safetensors')}")
    check_safetensors(shards)
    print(f"{shards.name}: reads tensors and slices into GPU memory", flush=True)
    for requirement in (f"torch=={pinned[1]}", "torch"):
        wheel = download(requirement)
        torch = unpacked_torch(wheel)
        linked = MachO(build(torch))
        check_memory_management(linked)
        check_private_names(torch)
        symbols, sent = check_symbols(linked, torch), check_messages(linked, messages)
        print(f"{wheel.name}: linked; {symbols} symbols and {sent} messages exist", flush=True)


if __name__ == "__main__":
    try:
        main()
    except LinkError as error:
        sys.exit(f"error: {error}")
