"""Says what a bug report needs: versions, device, kernels, threads, caches, environment.

``python -m torch_q4metal.doctor`` also runs known-answer tests of all kernels of the devices that
are there, a line each, and ends with exit code 1 if one fails.
"""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli import run
from .errors import Q4MetalError

if TYPE_CHECKING:
    from .device_check import Row

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_PACKAGES = (
    "torch_q4metal",
    "torch",
    "safetensors",
    "huggingface_hub",
    "tokenizers",
    "jinja2",
    "numpy",
    "gguf",
    "typer",
)
_HUB_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")
_SECRET = "HF_TOKEN"


def versions() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "system", platform.platform()
    for name in _PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def device() -> Iterator[tuple[str, str]]:
    import torch

    from . import ops
    from .environment import CPU
    from .machine import cpu_name
    from .memory import available_memory

    available = available_memory()
    yield "cpu", cpu_name()
    yield "cores", str(os.cpu_count())
    yield "threads", str(torch.get_num_threads())
    yield "memory available", "unknown" if available is None else f"{available / 1e9:.1f} GB"
    yield "kernels", f"{ops.cpu_kernels()} ({'forced' if CPU.get() else 'best for this CPU'})"
    yield "mps", _mps()


def _mps() -> str:
    from .device import resolve_device
    from .self_check import place

    try:
        resolve_device("mps")
    except Q4MetalError as error:
        return str(error)
    return place()


def kernel_checks() -> "Iterator[Row]":
    """Known-answer tests: of the CPU's kernels in use, and of the Metal kernels where MPS is."""
    import torch

    from .device_check import check_cpu, check_mps

    yield from check_cpu()
    if torch.backends.mps.is_available():
        yield from check_mps()


def caches() -> Iterator[tuple[str, str]]:
    import platformdirs
    from huggingface_hub.constants import HF_HUB_CACHE

    from .environment import CACHE

    converted = Path(CACHE.get() or platformdirs.user_cache_path("torch_q4metal"))
    for name, folder in (("converted models", converted), ("hub", Path(HF_HUB_CACHE))):
        yield name, f"{folder} ({_size_of(folder)})"


def _size_of(folder: Path) -> str:
    if not folder.is_dir():
        return "not there"
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return f"{sum(path.stat().st_size for path in files) / 1e6:.0f} MB"


def environment() -> Iterator[tuple[str, str]]:
    from .environment import VARIABLES

    for variable in VARIABLES:
        value = variable.get()
        shown = "not set" if value is None else value
        yield variable.name, f"{shown}  [{variable.values}: {variable.meaning}]"
    for name in (*_HUB_VARIABLES, *_THREAD_VARIABLES):
        if name in os.environ:
            yield name, "set (not shown)" if name == _SECRET else os.environ[name]


@app.command()
def main(debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False) -> None:
    """Prints versions, device, kernels, threads, caches and environment, and checks the kernels."""
    for title, rows in (
        ("versions", versions()),
        ("device", device()),
        ("caches", caches()),
        ("environment", environment()),
    ):
        print(title)
        for name, value in rows:
            print(f"  {name:<20} {value}")
    print("check")
    failed = []
    for row in kernel_checks():
        print(f"  {'ok' if row.ok else 'WRONG':<6} {row.name:<48} {row.text}", flush=True)
        if not row.ok:
            failed.append(row.name)
    if failed:
        raise Q4MetalError(
            f"{len(failed)} known-answer tests failed ({failed[0]}); report it with this output, "
            "and meanwhile use Q4METAL_CPU=ref, or device='cpu' where it was Metal."
        )


if __name__ == "__main__":
    run(app)
