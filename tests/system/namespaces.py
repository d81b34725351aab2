"""Hosts that are network namespaces of this machine, on a switch with a delay and 100 Mbit/s links.

with network(tmp_path, 3, delay=0.020) as hosts:
    hosts[1].start("python", ...)       # a subprocess.Popen on that host

Needs root and iproute2. A command that the kernel refuses fails the test, with what it said. All
processes, interfaces and namespaces are gone afterwards; what a killed run left is removed first.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

RELAY = Path(__file__).with_name("relay.py")
PREFIX = "q4test"
# Frames are relayed as they are: none longer than the MTU, and all with their checksums.
NO_OFFLOAD = """
import array, fcntl, socket, struct
for command in (0x17, 0x1F, 0x24):  # ETHTOOL_STXCSUM, STSO, SGSO
    value = array.array("I", [command, 0])
    request = struct.pack("16sP16x", b"eth0", value.buffer_info()[0])
    fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8946, request)
"""


class Host:
    """One namespace, with one interface, eth0."""

    def __init__(self, name: str, folder: Path, number: int) -> None:
        self.name, self.number = name, number
        self.address = f"10.77.0.{number + 1}"
        self.folder = folder / f"host{number}"
        self.folder.mkdir()
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *words: str | Path, **environment: str) -> subprocess.Popen[str]:
        """Starts a command; its output is piped, its standard input empty."""
        environment = dict(os.environ) | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "Q4METAL_CACHE": str(self.folder / "cache"), "HOME": str(self.folder),
            "GLOO_SOCKET_IFNAME": "eth0", "OMP_WAIT_POLICY": "PASSIVE",
        } | environment  # fmt: skip
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *map(str, words)],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.processes.append(process)
        return process


@contextmanager
def network(folder: Path, count: int, delay: float) -> Iterator[list[Host]]:
    """``count`` hosts; a frame takes ``delay`` seconds from one to another."""
    if os.geteuid() != 0:
        pytest.fail("network namespaces need root: run make test-system as root.")
    remove_abandoned()
    switch = Host(f"{PREFIX}-{os.getpid()}-switch", folder, 99)
    hosts = [Host(f"{PREFIX}-{os.getpid()}-{i}", folder, i) for i in range(count)]
    try:
        for host in [switch, *hosts]:
            call("ip", "netns", "add", host.name)
        for host in hosts:
            connect(host, switch)
        relay = switch.start(sys.executable, RELAY, str(delay), *[f"port{h.number}" for h in hosts])
        assert relay.stdout is not None
        if relay.stdout.readline() != "ready\n":
            pytest.fail(f"the relay did not start: {relay.communicate()[1]}")
        yield hosts
    finally:
        for host in [*hosts, switch]:
            stop(host)


def connect(host: Host, switch: Host) -> None:
    """A cable of 100 Mbit/s in either direction between a host and the switch."""
    inside, port = ("ip", "netns", "exec", host.name), f"port{host.number}"
    call("ip", "link", "add", port, "netns", switch.name, "type", "veth",
         "peer", "name", "eth0", "netns", host.name)  # fmt: skip
    call(*inside, "ip", "address", "add", f"{host.address}/24", "dev", "eth0")
    call(*inside, sys.executable, "-c", NO_OFFLOAD)
    for name, interface in ((host.name, "eth0"), (switch.name, port)):
        call("ip", "-n", name, "link", "set", interface, "up")
        call("tc", "-n", name, "qdisc", "add", "dev", interface, "root", "tbf",
             "rate", "100mbit", "burst", "32kb", "latency", "200ms")  # fmt: skip
    call("ip", "-n", host.name, "link", "set", "lo", "up")


def stop(host: Host) -> None:
    """Ends a host with everything on it."""
    for process in host.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    for process in host.processes:
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=10)
    remove(host.name)
    for process in host.processes:
        process.communicate()


def remove(name: str) -> None:
    """Removes a namespace, if it is there, and all that runs in it."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    for pid in pids.stdout.split():  # torchrun's workers have sessions of their own
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def remove_abandoned() -> None:
    """Removes the namespaces of test processes that are not there any more."""
    listed = call("ip", "netns", "list")
    for name, pid in re.findall(rf"^({PREFIX}-(\d+)-\w+)", listed, re.MULTILINE):
        if not Path(f"/proc/{pid}").exists():
            remove(name)


def call(*words: str) -> str:
    """What a command prints. Fails the test if it cannot run, with what it says."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.fail(f"{words[0]} is missing: make test-system installs it with iproute2.")
    if done.returncode:
        pytest.fail(f"this kernel cannot do `{' '.join(words)}`: {done.stderr.strip()}")
    return done.stdout
