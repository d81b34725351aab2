"""Where ranks listen and connect: always one address that somebody named, never all of them."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from ..errors import PipelineError
from .addresses import interfaces

logger = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]


@dataclass(frozen=True)
class Address:
    """A host, by name or number, and a TCP port."""

    host: str
    port: int

    @staticmethod
    def parse(text: str) -> Address:
        """Of HOST:PORT or [IPv6]:PORT. Raises PipelineError."""
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise PipelineError(f"--connect is HOST:PORT, like 192.168.1.10:29400, not {text!r}.")
        return Address(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def connect(connecting: Socket, address: Address) -> None:
    """Begins to connect. Raises PipelineError if the host's name is unknown."""
    _open(connecting, _resolve(address.host), address.port, connecting.connect)


def listen_first(listening: Socket, address: Address, bind: str | None) -> Address:
    """Rank 0: listens on the address that all ranks are given, or on ``bind`` at its port.

    ``bind``  an interface's name, or an address of this machine
    Returns where it listens. Raises PipelineError if it cannot, or if that would be everywhere.
    """
    number = _resolve(bind or address.host)
    is_name = address.host not in ("localhost", number)
    if bind is None and is_name and ipaddress.ip_address(number).is_loopback:
        logger.warning(
            "%s is %s on this machine, which no other machine reaches; name the network with "
            "--interface or --bind.", address.host, number,
        )  # fmt: skip
    return _listen(listening, number, address.port)


def listen_later(listening: Socket, rank: int, first: Address, bind: str | None) -> Address:
    """Other ranks: listens on ``bind``, or on loopback if rank 0 does.

    The port is rank 0's plus twice the rank, for firewalls, and any other if that is taken.
    Returns where it listens. Raises PipelineError if it cannot.
    """
    number = _resolve(bind or first.host)
    if bind is None and not ipaddress.ip_address(number).is_loopback:
        raise PipelineError(
            "the next rank connects to this one: name the network it comes from with "
            "--interface NAME, or this machine's address with --bind ADDRESS."
        )
    try:
        return _listen(listening, number, first.port + 2 * rank)
    except PipelineError:
        return _listen(listening, number, None)


def listen_beside(listening: Socket, address: Address) -> Address:
    """Listens at the port behind one where this rank listens already, or any other if it is taken.

    Returns where it listens. Raises PipelineError if it cannot.
    """
    try:
        return _listen(listening, address.host, address.port + 1)
    except PipelineError:
        return _listen(listening, address.host, None)


def _listen(listening: Socket, number: str, port: int | None) -> Address:
    if ipaddress.ip_address(number).is_unspecified:
        raise PipelineError(
            f"{number} means every network of this machine; name one address or interface."
        )
    try:
        _open(listening, number, "*" if port is None else port, listening.bind)
    except zmq.ZMQError as error:
        cure = "choose another port"
        if error.errno != zmq.EADDRINUSE:
            cure = "name an address of this machine with --bind, or --interface NAME"
        raise PipelineError(f"cannot listen on {number}:{port} ({error}); {cure}.") from None
    return _own_address(listening)


def _open(opened: Socket, number: str, port: int | str, how: Callable[[str], object]) -> None:
    opened.ipv6 = ":" in number
    how(f"tcp://[{number}]:{port}" if ":" in number else f"tcp://{number}:{port}")


def _resolve(name: str) -> str:
    """The numeric address of a host or of one of this machine's interfaces."""
    addresses = interfaces()
    if name in addresses:
        return addresses[name]
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise PipelineError(
            f"{name!r} is no known host, address or interface ({error}); interfaces here: "
            f"{', '.join(addresses)}."
        ) from None
    found.sort(key=lambda each: each[0] != socket.AF_INET)  # networks without IPv6 are common
    return str(found[0][4][0])


def _own_address(listening: Socket) -> Address:
    endpoint = listening.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return Address.parse(endpoint.decode().removeprefix("tcp://"))
