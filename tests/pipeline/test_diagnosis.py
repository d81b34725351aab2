"""First-hour failures: what the system really says, and the sentence and cure that follow."""

import datetime
import os
import re
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from torch_q4metal.errors import PipelineError
from torch_q4metal.pipeline import addresses, launch
from torch_q4metal.pipeline.diagnosis import Party, explain, objections
from torch_q4metal.pipeline.rendezvous import connects_to

LOOPBACK_INTERFACE = "lo" if sys.platform == "linux" else "lo0"

# As torch 2.13's store and gloo say it, taken down on Linux.
STORE = "The client socket has failed to connect to any network address of (10.88.0.77, 29611). "
STORE += "The client socket has failed to connect to 222.85.0.0:10141 (errno: {})."
GLOO = "Gloo connectFullMesh failed with [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/"


@pytest.mark.parametrize(("text", "sentence"), [
    ("The client socket has timed out after 4000ms while trying to connect to (a, 29611).",
     r"^rank 0 does not answer: .*firewall .*ufw allow from"),
    (STORE.format("113 - No route to host"), r"^there is no route to rank 0: .*firewall-cmd"),
    (STORE.format("101 - Network is unreachable"), r"^this machine is in no network of rank 0"),
    (GLOO + "pair.cc:152] timed out connecting: SO_ERROR: Connection refused, "
     "remote=[10.88.0.1]:21905$1", r"^10\.88\.0\.1 refuses the connection: nothing listens there"),
    (GLOO + "pair.cc:152] timed out connecting: SO_ERROR: Connection refused, "
     "remote=[127.0.0.1]:21905$1", r"^the other rank says that it is at 127\.0\.0\.1.*--interface"),
    (GLOO + "pair.h:311] Connect timeout [none]", r"^rank 0 does not answer: .*firewall"),
    ("[enforce fail at /__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/device.cc:84] "
     "ifa != nullptr. Unable to find address for: en9", r"no network interface en9 here"),
    ("something new\nin two lines", "^something new$"),
])  # fmt: skip
def test_what_torch_and_gloo_say(text, sentence):
    assert re.search(sentence, explain(RuntimeError(text), "rank 0", "linux"))


def test_macos_keeps_programs_from_the_local_network():
    """Its sentence for a permission that was not given is that of a missing route."""
    error = OSError(65, "No route to host")  # EHOSTUNREACH there
    assert "Privacy & Security > Local Network" in explain(error, "10.0.0.1:29400", "darwin")
    assert "Local Network" not in explain(error, "10.0.0.1:29400", "linux")


def test_sockets_of_this_system():
    """What connections to nowhere really raise here."""
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        why = addresses.why_unreachable("127.0.0.1", port, 2)
    assert why.startswith(f"127.0.0.1:{port} refuses the connection: nothing listens there")
    why = addresses.why_unreachable("no-such-host.invalid", 29400, 2)
    assert "name in no-such-host.invalid:29400 is not known here" in why
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert addresses.why_unreachable("127.0.0.1", listener.getsockname()[1], 2) is None
    with pytest.raises(PipelineError, match=r"no way to no-such-host\.invalid: the name in"):
        addresses.address_toward("no-such-host.invalid")


def test_the_store_of_this_torch(capfd):
    """What its client really raises is recognised."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        timeout = datetime.timedelta(milliseconds=200)
        with pytest.raises(RuntimeError) as caught:
            dist.TCPStore("127.0.0.1", port, 2, False, timeout)
    assert explain(caught.value, "rank 0").startswith("rank 0 does not answer")


LOOPBACK = Party("mac2", "darwin", "127.0.0.1", "en0", "192.168.1.11")
FINE = Party("mac1", "darwin", "192.168.1.10", "en0", "192.168.1.10")
LINUX = Party("box", "linux", "192.168.1.12", "eth0", "192.168.1.12")


def test_a_name_that_means_loopback_is_named_with_its_cure():
    (found,) = objections([FINE, LOOPBACK], machines=2)
    assert found == (
        "rank 1 on mac2 would be reached at 127.0.0.1, which is loopback: that is what the "
        "machine's name means there; start it with --interface en0 (192.168.1.11)."
    )
    assert not objections([FINE, LOOPBACK], machines=1)
    local = Party("mac1", "darwin", "127.0.0.1", "lo0", "127.0.0.1")
    assert not objections([local, local], machines=2)  # rehearsed on one machine


def test_systems_that_gloo_cannot_join():
    (found,) = objections([FINE, LINUX], machines=2)
    assert "rank 1 on box runs linux and rank 0 runs darwin" in found
    assert "python -m torch_q4metal.cluster run" in found


def test_who_connects_to_whom():
    """Gloo's order is that of the addresses, not of the ranks."""
    addresses = ["10.0.0.9", "10.0.0.200", "10.0.1.3"]
    assert [connects_to(rank, addresses) for rank in range(3)] == [[], [0], [0, 1]]
    addresses.reverse()
    assert [connects_to(rank, addresses) for rank in range(3)] == [[1, 2], [0, 2], [0, 1]]
    assert connects_to(1, ["127.0.0.1"] * 2) == [0]


def test_gloo_listens_where_its_address_is_said_to_be(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)
    assert addresses.gloo_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "en99")
    with pytest.raises(
        PipelineError, match=r"--interface en99 has no IPv4 .*lo0? \(127\.0\.0\.1\)"
    ):
        addresses.gloo_address()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert addresses.gloo_address() == "127.0.0.1"  # as torch does then


def test_the_interface_option(monkeypatch):
    with pytest.raises(PipelineError, match="--interface is for several ranks"):
        launch.use_interface(LOOPBACK_INTERFACE)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "other")
    with pytest.raises(PipelineError, match="--interface en99 has no IPv4 address"):
        launch.use_interface("en99")
    launch.use_interface(LOOPBACK_INTERFACE)
    assert os.environ["GLOO_SOCKET_IFNAME"] == LOOPBACK_INTERFACE


def test_ranks_that_cannot_join_all_say_why(tmp_path):
    """Two processes of a made-up network of two machines, one of which names loopback."""
    port = free_port()
    code = (
        "from torch_q4metal.pipeline import rendezvous as r\n"
        "r.gloo_address = lambda: '127.0.0.1'\n"
        "r.torchrun_address = lambda: '192.0.2.1'\n"
        "from torch_q4metal.pipeline.launch import join\n"
        "join()\n"
    )
    environment = dict(os.environ) | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment | {"RANK": str(rank)},
                         stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        last = said.strip().splitlines()[-1]
        assert "PipelineError: rank 0 on" in last
        assert "start it with --interface NAME (192.0.2.1)." in last


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
