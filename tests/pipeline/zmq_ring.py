"""Rings over ZeroMQ in one process: threads for ranks, real TCP connections on loopback."""

import random
import socket
from concurrent.futures import ThreadPoolExecutor

import zmq

from torch_q4metal.pipeline.key_file import Key
from torch_q4metal.pipeline.zmq_address import Address
from torch_q4metal.pipeline.zmq_transport import ZmqTransport


def new_key():
    return Key(*zmq.curve_keypair())


def free_address(ports=8):
    """A loopback address with some free ports behind it, which the system gives nobody else."""
    while True:
        port = random.randrange(20_000, 32_000)
        try:
            for i in range(ports):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + i))
        except OSError:
            continue
        return Address("127.0.0.1", port)


def zmq_ring(world_size, key=None, address=None, **options):
    """The transports of all ranks, joined."""
    key, address = key or new_key(), address or free_address()
    with ThreadPoolExecutor() as threads:
        joining = [
            threads.submit(ZmqTransport, rank, world_size, address, key, **options)
            for rank in reversed(range(world_size))  # rank 0 need not be the first
        ]
        return [each.result(30) for each in reversed(joining)]


def close(transports):
    """Rank 0 first, which the others wait for."""
    for transport in transports:
        transport.close()
