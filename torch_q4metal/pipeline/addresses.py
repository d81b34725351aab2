"""Which of this machine's addresses the other ranks use."""

from __future__ import annotations

import os
import socket
import struct
import sys

from ..errors import PipelineError

_GET_ADDRESS = 0xC0206921 if sys.platform == "darwin" else 0x8915  # SIOCGIFADDR


def torchrun_address() -> str:
    """The address by which ranks under torchrun reach this machine.

    That of ``GLOO_SOCKET_IFNAME``, as gloo takes it, or the one that packets to the master leave
    from. Raises PipelineError.
    """
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        return interface_address(interface.split(",")[0])
    return address_toward(os.environ.get("MASTER_ADDR", "localhost"))


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
        raise PipelineError(f"there is no way to {host} ({error.strerror}).") from None


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface. Raises PipelineError, listing them."""
    addresses = interfaces()
    if name not in addresses:
        there = ", ".join(f"{one} ({address})" for one, address in addresses.items())
        raise PipelineError(f"--interface {name} has no IPv4 address here; there are {there}.")
    return addresses[name]


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
