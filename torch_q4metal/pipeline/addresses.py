"""Which of this machine's addresses the other ranks use, and whether theirs are reached."""

from __future__ import annotations

import os
import socket
import struct
import sys

from ..errors import PipelineError
from .diagnosis import explain, unknown_interface

_GET_ADDRESS = 0xC0206921 if sys.platform == "darwin" else 0x8915  # SIOCGIFADDR


def torchrun_address() -> str:
    """The address by which ranks under torchrun reach this machine.

    That of ``GLOO_SOCKET_IFNAME``, as gloo takes it, or the one that packets to the master leave
    from. Raises PipelineError.
    """
    return _named_address() or address_toward(os.environ.get("MASTER_ADDR", "localhost"))


def gloo_address() -> str:
    """The address at which gloo will listen.

    That of ``GLOO_SOCKET_IFNAME``, or the first of this machine's own name that it can listen on,
    or loopback. Raises PipelineError if there is no such interface.
    """
    if named := _named_address():
        return named
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return str(address[0])
        except OSError:
            continue
    return "127.0.0.1"


def _named_address() -> str | None:
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    return interface_address(interface.split(",")[0]) if interface else None


def address_toward(host: str) -> str:
    """The address that this machine has on its way to ``host``; nothing is sent.

    Raises PipelineError if the name is unknown or there is no way.
    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            address: str = probe.getsockname()[0]
            return address
    except OSError as error:
        raise PipelineError(f"there is no way to {host}: {explain(error, host)}") from None


def why_unreachable(host: str, port: int, seconds: float) -> str | None:
    """Connects over TCP and hangs up. None if that works, else why not and the cure."""
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        socket.create_connection((host, port), seconds).close()
    except OSError as error:
        return explain(error, target)
    return None


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface. Raises PipelineError, listing them."""
    addresses = interfaces()
    if name not in addresses:
        raise PipelineError(unknown_interface(name, addresses))
    return addresses[name]


def interface_of(address: str) -> str:
    """The interface that has an IPv4 address; "" if none here has it."""
    return next((name for name, own in interfaces().items() if own == address), "")


def interfaces() -> dict[str, str]:
    """Name -> IPv4 address of the network interfaces that have one."""
    import fcntl

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)
            except OSError:  # it is down, or has none
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found
