"""Sets up the peers, each in a virtual environment of its own: ``python benchmarks/peers.py``.

    llama_cpp          llama-cpp-python 0.3.36, built for this processor (15 minutes on 2 cores)
    llama_cpp_avx512   the same without AMX, for a processor that has it
    llama_cpp_avx2     the same for AVX2 only
    openvino           OpenVINO 2026.4.1, a wheel (59 MB)

Everything comes from the package registry that pip is set up for and lands in .peers/. llama.cpp
needs a C++ compiler; cmake and ninja are fetched by pip where they are missing. What is there
already is kept.

A machine without network takes packages from a folder: --wheels DIR, where DIR/NAME holds those of
one environment alone (llama.cpp builds of one version differ by nothing but their folder). What
else they need, numpy, is then taken from the interpreter that runs this script.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass, field
from pathlib import Path

PEERS = Path(__file__).resolve().parent.parent / ".peers"
_LLAMA = "llama-cpp-python==0.3.36"


@dataclass(frozen=True)
class Environment:
    """``cmake``: options of llama.cpp's build. ``check``: an import that proves it complete."""

    requirement: str
    check: str
    cmake: tuple[str, ...] = field(default=())


def _llama(*options: str) -> Environment:
    return Environment(_LLAMA, "llama_cpp", options)


_AVX2 = ("-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON", "-DGGML_BMI2=ON")
_AVX512 = (
    "-DGGML_AVX512=ON",
    "-DGGML_AVX512_VBMI=ON",
    "-DGGML_AVX512_VNNI=ON",
    "-DGGML_AVX512_BF16=ON",
)
ENVIRONMENTS = {
    "llama_cpp": _llama("-DGGML_NATIVE=ON"),
    "llama_cpp_avx512": _llama("-DGGML_NATIVE=OFF", *_AVX2, *_AVX512),
    "llama_cpp_avx2": _llama("-DGGML_NATIVE=OFF", *_AVX2, "-DGGML_AVX512=OFF"),
    "openvino": Environment("openvino==2026.4.1", "openvino"),
}


def python_of(name: str) -> Path:
    return PEERS / name / "bin" / "python"


def is_ready(name: str) -> bool:
    """Whether the environment exists and its package imports."""
    python, module = python_of(name), ENVIRONMENTS[name].check
    if not python.exists():
        return False
    probe = subprocess.run([python, "-c", f"import {module}"], capture_output=True)
    return probe.returncode == 0


def set_up(name: str, wheels: Path | None = None) -> None:
    """Makes the environment unless it is ready. Raises CalledProcessError when pip fails."""
    if is_ready(name):
        return
    environment = ENVIRONMENTS[name]
    print(f"setting up {name}: {environment.requirement} ...", file=sys.stderr, flush=True)
    # pip of this interpreter serves: some systems have no ensurepip to give a new one its own.
    venv.create(PEERS / name, clear=True, with_pip=False)
    command = [sys.executable, "-m", "pip", "--python", str(python_of(name)), "install"]
    # pip's cache of built wheels does not know cmake's options and would hand out another build.
    command += ["--no-cache-dir", "--disable-pip-version-check", environment.requirement]
    if wheels is not None:
        _share_packages(name)
        command += ["--no-index", "--no-deps", "--find-links", str(wheels / name)]
        command += ["--find-links", str(wheels)]
    settings = {"CMAKE_ARGS": " ".join(environment.cmake)} if environment.cmake else {}
    subprocess.run(command, env={**os.environ, **settings}, check=True, stdout=sys.stderr)


def _share_packages(name: str) -> None:
    """Lets the environment see this interpreter's packages, after its own."""
    found = subprocess.run(
        [python_of(name), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    ours = sysconfig.get_path("purelib")
    (Path(found.stdout.strip()) / "shared.pth").write_text(f"{ours}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="which ones (llama_cpp and openvino)"
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="take packages from DIR only")
    options = parser.parse_args()
    for name in options.names:
        if name not in ENVIRONMENTS:
            parser.error(f"{name!r} is not one of {', '.join(ENVIRONMENTS)}")
    for name in options.names or ("llama_cpp", "openvino"):
        set_up(name, options.wheels)
        print(f"{name}: ready")


if __name__ == "__main__":
    main()
