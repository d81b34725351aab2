"""What usually goes wrong in a cluster's first hour, and its cure, told from what the system said.

Pure functions: an error or addresses in, sentences out. Nothing is looked up, sent or changed.
"""

from __future__ import annotations

import ipaddress
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NO_INTERFACE = re.compile(r"Unable to find address for: (\S+)")  # gloo
_REMOTE = re.compile(r"remote=\[([^\]]+)\]")  # gloo: whom it tried
_NO_NAME = (
    "Name or service not known", "nodename nor servname", "Temporary failure in name",
    "No address associated", "cannot be retrieved",
)  # fmt: skip
_TIMED_OUT = ("timed out", "Connect timeout", "timeout after")


def explain(error: BaseException | str, target: str, system: str = sys.platform) -> str:
    """Why ``target`` ("HOST:PORT", or a rank in words) is not reached, and the cure; a sentence.

    ``error``   of a socket, torch's store, gloo or libzmq, as it is
    ``system``  of the machine on which it happened, as ``sys.platform``
    """
    text = str(error)
    if missing := _NO_INTERFACE.search(text):
        return f"there is no network interface {missing[1]} here; name another with --interface."
    if any(words in text for words in _NO_NAME):
        return f"the name in {target} is not known here; take the machine's address instead."
    if remote := _REMOTE.search(text):
        target = remote[1]
    if "refused" in text:
        return _refused(target, remote is not None)
    if "No route to host" in text:
        return _no_route(target, system)
    if "Network is unreachable" in text:
        return (
            f"this machine is in no network of {target}; join the same one, and take the address "
            "that the other machine has there."
        )
    if any(words in text for words in _TIMED_OUT):
        return (
            f"{target} does not answer: it is off, in another network, or its firewall drops "
            "what comes in; let TCP from this machine through there (macOS: System Settings > "
            "Network > Firewall; Linux: sudo ufw allow from ADDRESS)."
        )
    return text.splitlines()[0] if text else f"{type(error).__name__}."


def _refused(target: str, is_address: bool) -> str:
    if is_address and is_loopback(target):
        return (
            f"the other rank says that it is at {target}, which is this machine: over there "
            "the machine's own name means loopback; start it there with --interface NAME."
        )
    return (
        f"{target} refuses the connection: nothing listens there (is it started, and is that its "
        "port?), or a firewall of that machine rejects what comes in."
    )


def _no_route(target: str, system: str) -> str:
    if system == "darwin":
        return (
            f"macOS has no route to {target}: allow this terminal in System Settings > Privacy & "
            "Security > Local Network and start again; if it is allowed, no machine has that "
            "address."
        )
    return (
        f"there is no route to {target}: no machine in this network has that address, or its "
        "firewall rejects (Fedora, RHEL: sudo firewall-cmd --add-source=ADDRESS --zone=trusted)."
    )


def is_loopback(address: str) -> bool:
    """Whether an IPv4 or IPv6 address in numbers is only this machine's."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


@dataclass(frozen=True)
class Party:
    """One rank before it is connected.

    ``host``     its machine's name
    ``system``   as ``sys.platform``: darwin, linux
    ``address``  where gloo listens
    ``interface``, ``outward``  by which it reaches rank 0, and its address there; the interface is
                 "" if it is not known
    """

    host: str
    system: str
    address: str
    interface: str
    outward: str


def objections(parties: Sequence[Party], machines: int) -> list[str]:
    """Why ranks under torchrun on so many machines can't join, in order of rank; empty if they can.

    Each is a sentence with its cure.
    """
    found = []
    first = parties[0]
    for rank, party in enumerate(parties):
        who = f"rank {rank} on {party.host}"
        if party.system != first.system:
            found.append(
                f"{who} runs {party.system} and rank 0 runs {first.system}: torchrun's gloo can't "
                "join them; start both with python -m torch_q4metal.cluster run."
            )
        leads_out = not is_loopback(party.outward)
        if machines > 1 and is_loopback(party.address) and leads_out:
            found.append(
                f"{who} would be reached at {party.address}, which is loopback: that is what the "
                f"machine's name means there; start it with --interface "
                f"{party.interface or 'NAME'} ({party.outward})."
            )
    return found


def unknown_interface(name: str, interfaces: Mapping[str, str]) -> str:
    """That an interface is none here, or has no address; lists those that do."""
    there = ", ".join(f"{one} ({address})" for one, address in interfaces.items())
    return f"--interface {name} has no IPv4 address here; there are {there}."
