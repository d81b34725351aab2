"""Says what a bug report needs: versions, device, kernels, threads, caches, environment.

``python -m torch_q4metal.doctor`` also runs known-answer tests of all kernels of the devices that
are there, a line each, and ends with exit code 1 if one fails.

``--cluster`` measures all ranks of a cluster instead: cluster_doctor.py.
"""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli import EXIT_ERROR, refuse, run
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
    yield from _mps()


def _mps() -> Iterator[tuple[str, str]]:
    from .device import resolve_device
    from .memory import available_on_mps
    from .self_check import place

    try:
        resolve_device("mps")
    except Q4MetalError as error:
        yield "mps", str(error)
        return
    yield "mps", place()
    yield "mps memory", f"{available_on_mps() / 1e9:.1f} GB available"


def kernel_checks() -> "Iterator[Row]":
    """Known-answer tests: of the CPU's kernels in use, and of the Metal kernels where MPS is."""
    import torch

    from .device_check import check_cpu, check_loading, check_mps

    yield from check_cpu()
    if torch.backends.mps.is_available():
        yield check_loading()
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
def main(
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="measure all ranks of torchrun or torch_q4metal.cluster"),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="with --cluster: whose layers are given out, on rank 0")
    ] = None,
    connect: Annotated[
        str | None,
        typer.Option(help="with --cluster, alone: HOST:PORT of rank 0, looked at from here"),
    ] = None,
    interface: Annotated[
        str | None, typer.Option(help="under torchrun, the network that other machines are on")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="with --cluster: CPU threads")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="with --cluster: as JSON")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
) -> None:
    """Prints versions, device, kernels, threads, caches and environment, and checks the kernels.

    With --cluster: what every rank and every link between them does, and which is slowest.
    """
    from .pipeline.launch import own_place

    place = own_place()
    if cluster:
        _examine_cluster(model, connect, interface, threads, as_json, debug)
        return
    if place is not None:
        raise typer.BadParameter("several ranks need --cluster.", param_hint="doctor")
    refuse(
        {
            "--model": model,
            "--connect": connect,
            "--interface": interface,
            "--threads": threads,
            "--json": as_json,
        },
        "it needs --cluster beside it.",
    )
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


def _examine_cluster(
    model: str | None,
    connect: str | None,
    interface: str | None,
    threads: int | None,
    as_json: bool,
    debug: bool,
) -> None:
    import functools

    from .pipeline import launch
    from .terminal import show_log

    place = launch.own_place()
    if place is None and connect is None:
        raise typer.BadParameter(
            "start it on every machine, with torchrun or torch_q4metal.cluster, as you would the "
            "chat; or give --connect HOST:PORT to look at the way to rank 0 from here.",
            param_hint="--cluster",
        )
    if place is not None and connect is not None:
        raise typer.BadParameter("it is for this machine alone.", param_hint="--connect")
    show_log(quiet=place is not None and place.rank > 0 and not place.has_terminal, debug=debug)
    launch.use_interface(interface)
    from . import cluster_doctor

    if connect is not None:
        cluster_doctor.look_toward(connect)
        return
    launch.set_threads(threads)
    assert place is not None
    if place.rank == 0:
        from .hub import resolve_model

        source = None if model is None else functools.partial(resolve_model, model)
        cluster_doctor.examine(source, as_json)
    elif not cluster_doctor.answer():
        raise typer.Exit(EXIT_ERROR)


if __name__ == "__main__":
    run(app)
