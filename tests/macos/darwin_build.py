"""Runs setup.py as if on an Apple-silicon Mac: its sources, its flags, its link line. Python there
is python.org's, which asks for code for Intel too; CXX refuses that.

    python tests/macos/darwin_build.py TORCH BUILD

``TORCH`` is the folder ``torch`` of an unpacked macOS wheel (headers and libraries), ``BUILD``
receives objects and the linked extension. The compiler is ``CXX`` of the environment.
"""

import _osx_support
import os
import platform
import runpy
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
BOTH = "-arch arm64 -arch x86_64"


def main(torch_folder: Path, build: Path) -> None:
    """Builds the extension into ``build``/lib."""
    compiler = os.environ["CXX"]
    os.environ |= {
        "CC": compiler,
        "LDSHARED": f"{compiler} -bundle -undefined dynamic_lookup {BOTH}",
        "LDCXXSHARED": f"{compiler} -bundle -undefined dynamic_lookup {BOTH}",
        "_PYTHON_HOST_PLATFORM": "macosx-14.0-universal2",
    }
    os.environ.pop("ARCHFLAGS", None)
    _osx_support._supports_universal_builds = lambda: True  # it would read a file of macOS
    variables = sysconfig.get_config_vars()
    variables["CFLAGS"] += f" {BOTH}"
    variables["EXT_SUFFIX"] = ".cpython-311-darwin.so"
    variables["MACOSX_DEPLOYMENT_TARGET"] = "14.0"
    variables["LDFLAGS"] = ""  # of the Linux Python: -rpath and the like
    # From here on everything that asks sees a Mac; torch itself is loaded already.
    sys.platform = "darwin"
    platform.machine = lambda: "arm64"
    platform.system = lambda: "Darwin"
    torch.backends.mps.is_built = lambda: True
    from torch.utils import cpp_extension

    cpp_extension._TORCH_PATH = str(torch_folder)
    cpp_extension.TORCH_LIB_PATH = str(torch_folder / "lib")
    # Its answer comes from running the compiler's --version and asking for an Apple one.
    cpp_extension.get_compiler_abi_compatibility_and_version = lambda _: (True, "0.0.0")
    os.chdir(ROOT)
    sys.argv = [
        "setup.py",
        "-q",
        "build_ext",
        f"--build-lib={build}/lib",
        f"--build-temp={build}/o",
    ]
    runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
