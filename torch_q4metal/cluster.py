"""Several machines with one key: ``python -m torch_q4metal.cluster``.

    keygen FILE                                      once; copy FILE to every machine
    run --rank R --world-size N ... -- chat ...      on every machine, each with its own rank
    weights                                          what --stream-weights has kept here

Rank 0 has the terminal and the prompt; the others compute their layers until rank 0 ends. All that
travels is encrypted. Every rank is one process, the one that is started here.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli import run as run_app
from .pipeline import launch

if TYPE_CHECKING:
    from .pipeline.transport import Transport

APPS = ("chat", "bench", "doctor")

HELP = (
    "One model on several machines that share a key.\n\n"
    "Make the key once with keygen, copy it to every machine, and start run on each, with its own "
    "rank. Rank 0 has the terminal and the prompt; the others compute their layers until rank 0 "
    "ends. All that travels is encrypted."
)

app = typer.Typer(rich_markup_mode="rich", no_args_is_help=True, help=HELP)


@app.command()
def keygen(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("cluster.key"),
) -> None:
    """Makes the key that every machine of a cluster needs a copy of."""
    from .pipeline.key_file import write_key

    write_key(file)
    typer.echo(
        f"wrote {file}; copy it to every machine (scp {file} HOST:) and let nobody else have it",
        err=True,
    )


@app.command()
def run(
    command: Annotated[
        list[str],
        typer.Argument(help="After --: chat, bench or doctor, with its own options."),
    ],
    rank: Annotated[int, typer.Option(min=0, help="This process, 0 to world-size - 1.")],
    world_size: Annotated[int, typer.Option(min=2, help="How many processes there are.")],
    connect: Annotated[str, typer.Option(help="HOST:PORT where rank 0 listens.")],
    key: Annotated[Path, typer.Option(help="The file that keygen wrote, on every machine.")],
    bind: Annotated[
        str | None, typer.Option(help="Listen on this address of this machine.")
    ] = None,
    interface: Annotated[
        str | None, typer.Option(help="Listen on this network interface, like en0 or eth0.")
    ] = None,
    join_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds to wait for the other ranks.")
    ] = 300.0,
) -> None:
    """Runs an app on this machine as one rank of several."""
    name, *words = command
    if name not in APPS:
        raise typer.BadParameter(
            f"it starts with {', '.join(APPS[:-1])} or {APPS[-1]}, not {name}.",
            param_hint="COMMAND",
        )
    if rank >= world_size:
        raise typer.BadParameter(
            f"ranks of {world_size} are 0 to {world_size - 1}.", param_hint="--rank"
        )
    if bind and interface:
        raise typer.BadParameter("--bind names an address already.", param_hint="--interface")

    from .pipeline.addresses import interface_address
    from .pipeline.key_file import read_key
    from .pipeline.zmq_address import Address

    first, secret, own = Address.parse(connect), read_key(key), bind
    if interface:  # the last rank does not need it, and a wrong name is wrong there too
        own = interface_address(interface)

    def join() -> "Transport":
        from .pipeline.zmq_transport import ZmqTransport  # brings torch along

        return ZmqTransport(rank, world_size, first, secret, own, join_timeout=join_timeout)

    launch.take_place(launch.Place(rank, world_size, has_terminal=True), join)
    module = importlib.import_module(f".{name}", __package__)
    status = module.app(args=words, prog_name=name, standalone_mode=False)
    if isinstance(status, int) and status:
        raise typer.Exit(status)


@app.command()
def weights(
    remove_unused: Annotated[
        float | None,
        typer.Option(
            metavar="DAYS", min=0, help="Remove what no rank has used for so long; 0 removes all."
        ),
    ] = None,
) -> None:
    """Shows what --stream-weights has kept on this machine, or removes it."""
    from .hub_download import in_words
    from .pipeline.weight_pieces import PieceCache

    cache = PieceCache()
    if remove_unused is not None:
        files, size = cache.remove(remove_unused)
        typer.echo(f"removed {files} files, {in_words(size)}", err=True)
    files, size = cache.used()
    typer.echo(f"{cache.folder}: {files} files, {in_words(size)}")
    for days in (7, 30):
        files, size = cache.used(days)
        typer.echo(f"  not used for {days} days: {files} files, {in_words(size)}")


if __name__ == "__main__":
    run_app(app)
