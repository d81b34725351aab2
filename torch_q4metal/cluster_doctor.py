"""What ``doctor --cluster`` shows: every rank, every link, the slowest part, what is in the way."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PipelineError, Q4MetalError
from .pipeline import launch

if TYPE_CHECKING:
    from .pipeline.survey import LinkFacts, RankFacts

_TIMEOUT = 30.0  # seconds after which a silent rank is lost
_CONNECT_SECONDS = 10.0
_RESULT_BYTES = 128  # a message with one token id


@dataclass(frozen=True)
class Plan:
    """What ``--split auto`` gives each rank of a model.

    ``layers``       one range a rank
    ``bytes_read``   of weights, by each rank for a token
    ``hidden_size``  numbers of a row of the residual stream
    """

    layers: list[range]
    bytes_read: list[float]
    hidden_size: int


def examine(model: Callable[[], Path] | None, as_json: bool) -> None:
    """Rank 0: measures all ranks and links, and prints what it found.

    ``model``  its directory, if its layers are to be given out
    Raises Q4MetalError for what is in the way, after the table if that can be.
    """
    from .pipeline.survey import survey

    transport = launch.join()
    watch = launch.watch_over(transport)
    transport, roll = launch.call_roll(transport, watch, _TIMEOUT)
    ranks, links = survey(transport, watch, roll)
    launch.stop(transport, watch, None)
    transport.close()
    plan, error = None, None
    try:
        plan = None if model is None else _plan(model(), ranks)
    except Q4MetalError as caught:
        error = caught
    if as_json:
        print(json.dumps(_as_json(ranks, links, plan)))
    else:
        print("\n".join(table(ranks, links, plan)))
        print(slowest(ranks, links, plan))
    if error is not None:
        raise error


def answer() -> bool:
    """Other ranks: says what rank 0 asks. False if something went wrong that rank 0 tells about."""
    transport = launch.join()
    return launch.serve(transport, _no_model, launch.watch_over(transport))


def _no_model() -> Path:
    raise PipelineError("it runs the doctor; start the same app on every machine.")


def _plan(path: Path, ranks: list[RankFacts]) -> Plan:
    from .checkpoint import Checkpoint
    from .models.loading import read_family
    from .pipeline.handshake import RankInfo, Settings, layer_costs, plan_split

    checkpoint = Checkpoint.open(path)
    _, config = read_family(checkpoint)
    infos = [RankInfo(one.rank, one.host, speed=one.speed, memory=one.memory) for one in ranks]
    ranges = plan_split(checkpoint, Settings(), infos)
    layers, first, last = layer_costs(checkpoint, config, 0)
    read = [sum(layers[i].work for i in part) for part in ranges]
    read[0] += first.work
    read[-1] += last.work
    return Plan(ranges, read, config.hidden_size)


# ---- what is shown


def table(ranks: list[RankFacts], links: list[LinkFacts], plan: Plan | None) -> list[str]:
    """Lines of one column each for what a rank is and what its link to the next one does."""
    rows = [["rank", "host", "device", "threads", "memory free", "reads", "layers"]]
    rows[0] += ["link to", "round trip", "throughput"]
    for one, link in zip(ranks, links, strict=True):
        part = plan.layers[one.rank] if plan else range(0)
        layers = "-".join(str(layer) for layer in sorted({*part[:1], *part[-1:]})) or "-"
        memory = "unknown" if one.memory is None else f"{one.memory / 1e9:.1f} GB"
        rows.append([
            str(one.rank), one.host, one.device, str(one.threads), memory,
            f"{one.speed / 1e9:.1f} GB/s", layers, f"rank {link.end}",
            f"{link.round_trip_s * 1e3:.2f} ms", _rate(link.bytes_s),
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def slowest(ranks: list[RankFacts], links: list[LinkFacts], plan: Plan | None) -> str:
    """The slowest part, in a sentence."""
    if plan is None:
        memory = min(ranks, key=lambda one: one.speed)
        link = max(links, key=lambda one: one.round_trip_s / 2 + 1e5 / one.bytes_s)
        return (
            f"The slowest memory is that of {_name(memory)}, {memory.speed / 1e9:.1f} GB/s; the "
            f"slowest link is {_link_name(link)}, {link.round_trip_s * 1e3:.2f} ms and "
            f"{_rate(link.bytes_s)}; --model says which of them counts."
        )
    parts = [
        (read / one.speed, f"{_name(one)}, which reads {_size(read)} of weights a token")
        for one, read in zip(ranks, plan.bytes_read, strict=True)
    ]
    for link in links:
        row = 4 * plan.hidden_size if link.end else _RESULT_BYTES
        parts.append((link.round_trip_s / 2 + row / link.bytes_s, _link_name(link)))
    seconds, name = max(parts)
    total = sum(one for one, _ in parts)
    return (
        f"The slowest part is {name}: {seconds * 1e3:.1f} of the {total * 1e3:.1f} ms that a token "
        f"takes at least, which is {1 / total:.0f} tok/s at most."
    )


def _as_json(ranks: list[RankFacts], links: list[LinkFacts], plan: Plan | None) -> dict[str, Any]:
    layers = [[part.start, part.stop] for part in plan.layers] if plan else None
    return {
        "ranks": [asdict(one) for one in ranks], "links": [asdict(one) for one in links],
        "layers": layers, "bytes_read": plan.bytes_read if plan else None,
        "slowest": slowest(ranks, links, plan),
    }  # fmt: skip


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _rate(bytes_s: float) -> str:
    bits = 8 * bytes_s
    return f"{bits / 1e9:.1f} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.0f} Mbit/s"


def _name(one: RankFacts) -> str:
    return f"rank {one.rank} on {one.host}"


def _link_name(link: LinkFacts) -> str:
    return f"the link from rank {link.begin} to rank {link.end}"


# ---- from one machine alone


def look_toward(text: str) -> None:
    """Prints what this machine makes of rank 0's address, HOST:PORT, and whether it answers.

    Raises PipelineError if it does not.
    """
    from .pipeline import addresses
    from .pipeline.diagnosis import is_loopback
    from .pipeline.zmq_address import Address

    target = Address.parse(text)
    own = addresses.address_toward(target.host)
    means = addresses.gloo_address()
    print(f"this machine   {socket.gethostname()}, which under torchrun means {means}")
    networks = [f"{name} {address}" for name, address in addresses.interfaces().items()]
    print(f"interfaces     {', '.join(networks)}")
    print(f"the way there  {own} {addresses.interface_of(own)}".rstrip())
    if is_loopback(means) and not is_loopback(own):
        print(
            f"under torchrun add --interface {addresses.interface_of(own)}: by its name alone "
            "no other machine reaches this one."
        )
    if why := addresses.why_unreachable(target.host, target.port, _CONNECT_SECONDS):
        raise PipelineError(why)
    print(f"{target} answers (torch_q4metal.cluster logs that as a connection without a key).")
