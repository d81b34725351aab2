"""Where ranks under torchrun meet before gloo connects them: in torch's store.

Gloo says nothing while it waits, and goes on for minutes or for ever where an address or a firewall
is wrong. So every rank writes down where it will listen, all look at what the others wrote and
whether they can be reached, and all end with the reason if something is in the way.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import sys
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import PipelineError
from .addresses import gloo_address, interface_of, torchrun_address, why_unreachable
from .diagnosis import Party, objections

_STORE_TIMEOUT = timedelta(minutes=5)  # to reach the store, which torchrun has reached before
_FOREVER = timedelta(days=3650)  # another rank may be fetching the model
_CONNECT_SECONDS = 10.0


def meet() -> tuple[dist.Store, int, int]:
    """(torch's store, this rank, how many there are), once all are there and fit together.

    Raises PipelineError, on every rank, if they can't join.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=_STORE_TIMEOUT))
    address = gloo_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listener:
        said = _exchange(store, "party", rank, size, _own_party(address, listener))
        parties = [Party(**each["party"]) for each in said]
        found = objections(parties, _machines(size))
        if not found:
            unreached = _exchange(store, "unreached", rank, size, _unreached(rank, said))
            found = [sentence for each in unreached for sentence in each]
    if found:
        raise PipelineError(" ".join(found))
    return store, rank, size


def _own_party(address: str, listener: socket.socket) -> dict[str, Any]:
    outward = torchrun_address()
    way = interface_of(outward)
    party = Party(socket.gethostname(), sys.platform, address, way, outward)
    return {"party": asdict(party), "port": listener.getsockname()[1]}


def connects_to(rank: int, addresses: list[str]) -> list[int]:
    """The ranks to which one will connect, by the addresses of all; the others come to it.

    The watch connects to rank 0 and to the rank before. Of two ranks, gloo lets the one with the
    greater address connect (seen on Linux with torch 2.13; for macOS as Device::connect of
    gloo/transport/uv/device.cc has it).
    """
    found = {0, rank - 1} if rank > 0 else set()
    own = ipaddress.ip_address(addresses[rank])
    for other, text in enumerate(addresses):
        theirs = ipaddress.ip_address(text)
        if theirs.version == own.version and int(theirs) < int(own):
            found.add(other)
    return sorted(found)


def _unreached(rank: int, said: list[dict[str, Any]]) -> list[str]:
    """Why this rank does not reach those to which it will connect."""
    found = []
    addresses = [one["party"]["address"] for one in said]
    for other in connects_to(rank, addresses):
        host, port = said[other]["party"]["host"], said[other]["port"]
        if why := why_unreachable(addresses[other], port, _CONNECT_SECONDS):
            found.append(
                f"rank {rank} on {socket.gethostname()} does not reach rank {other} on {host}: "
                f"{why}"
            )
    return found


def _exchange(store: dist.Store, name: str, rank: int, size: int, own: Any) -> list[Any]:
    """What every rank gives, in order of rank, once all have."""
    keys = [f"torch_q4metal/{name}/{each}" for each in range(size)]
    store.set(keys[rank], json.dumps(own))
    store.wait(keys, _FOREVER)
    return [json.loads(store.get(key)) for key in keys]


def _machines(world_size: int) -> int:
    """How many torchrun was told of; without torchrun, each rank may be on its own."""
    return int(os.environ.get("GROUP_WORLD_SIZE", world_size))
