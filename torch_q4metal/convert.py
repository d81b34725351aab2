"""Convert a model to an MLX checkpoint: ``python -m torch_q4metal.convert SRC DIR``.

SRC is a GGUF file, whose weights keep their values, or a Hugging Face checkpoint (directory or hub
id), which is quantized. Messages go to stderr.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, Protocol

import typer

from .cli import console, run
from .errors import CheckpointError
from .terminal import show_log

app = typer.Typer(rich_markup_mode="rich")


class Conversion(Protocol):
    """A checkpoint that is yet to be written: ``GgufCheckpoint`` and ``QuantizedCheckpoint``."""

    @property
    def total_bytes(self) -> int: ...

    def write(self, folder: Path, progress: Callable[[int], None] | None = None) -> None: ...


@app.command()
def main(
    source: Annotated[
        str | None,
        typer.Argument(metavar="SRC", help="A .gguf file, a model directory or a hub id."),
    ] = None,
    target: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="The folder to be made.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="2, 3, 4, 5, 6 or 8 bits a weight; 4 if left out.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="32, 64 or 128 weights a scale; 64 if left out.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of scales and dense tensors; the checkpoint's own if left out."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is cached.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace DIR if it is a model folder.")
    ] = False,
    built_in: Annotated[
        bool,
        typer.Option(
            "--built-in", help="Convert the built-in model into the cache and print its folder."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks for all errors.")] = False,
) -> None:
    """Make an MLX checkpoint of a GGUF file (values kept) or a Hugging Face model (quantized)."""
    show_log(debug=debug)
    options = (bits, group_size, dtype, revision)
    if built_in:
        if source or target or force or any(option is not None for option in options):
            raise typer.BadParameter("--built-in goes without SRC, DIR and their options")
        typer.echo(_built_in())
        return
    if source is None or target is None:
        raise typer.BadParameter("give SRC and DIR, or --built-in")
    from .config import AFFINE_BITS, GROUP_SIZES
    from .output_folder import check_target, output_folder

    if bits not in (None, *AFFINE_BITS) or group_size not in (None, *GROUP_SIZES):
        raise typer.BadParameter(f"bits are one of {AFFINE_BITS}, group sizes one of {GROUP_SIZES}")
    check_target(target, force=force)  # before anything is downloaded or read
    if _is_gguf(Path(source)):
        if any(option is not None for option in options):
            raise typer.BadParameter("a GGUF file keeps its own bits, group size and dtypes")
        conversion: Conversion = _gguf(Path(source))
    else:
        conversion = _hugging_face(source, bits or 4, group_size or 64, dtype, revision, offline)
    with (
        _progress(f"converting {Path(source).name}", conversion.total_bytes) as advance,
        output_folder(target, force=force) as folder,
    ):
        conversion.write(folder, advance)
    _report(target)


def _built_in() -> Path:
    from .builtin_model import builtin_model

    size = 98_000_000  # about: a bar that waits for the exact number comes too late
    with _progress("preparing the built-in model", size) as advance:
        return builtin_model(advance)


def _is_gguf(source: Path) -> bool:
    if source.suffix.lower() == ".gguf":
        return True
    if not source.is_file():
        return False
    try:
        with source.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise CheckpointError(f"cannot read {source}: {error.strerror}.") from error


def _gguf(source: Path) -> Conversion:
    from .gguf_checkpoint import GgufCheckpoint

    return GgufCheckpoint(source)


def _hugging_face(
    source: str, bits: int, group_size: int, dtype: str | None, revision: str | None, offline: bool
) -> Conversion:
    from .hub import resolve_model
    from .quantize_checkpoint import QuantizedCheckpoint

    path = resolve_model(source, revision=revision, offline=offline)
    return QuantizedCheckpoint(path, bits=bits, group_size=group_size, dtype=dtype)


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar in a terminal, nothing elsewhere."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    screen = console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda size: bar.advance(task, size)


def _report(folder: Path) -> None:
    from .config import read_json

    index = read_json(folder / "model.safetensors.index.json")
    size, parameters = (int(index["metadata"][key]) for key in ("total_size", "total_parameters"))
    files = len(set(index["weight_map"].values()))
    console().print(
        f"wrote {folder}: {size / 1e6:.1f} MB of weights in {files} file{'s' if files > 1 else ''},"
        f" {parameters / 1e6:.1f} million parameters, {size * 8 / parameters:.2f} bits each",
        soft_wrap=True,
        markup=False,
    )


if __name__ == "__main__":
    run(app)
