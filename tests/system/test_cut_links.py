"""Three hosts, of which one loses its network, or two each other, while rank 0 writes an answer.

All ranks end with an error, and rank 0 says which it was; through the real ``torchrun --nnodes``
and through ``torch_q4metal.cluster``.
"""

import subprocess
import sys
import threading
import time

import pytest
from namespaces import call, network
from speaking import write_speaking
from test_network_namespaces import command

TIMEOUT = 5
TORCHRUN = 35  # seconds that its agent may take after its rank has ended


def cut_off(host):
    """As if its cable was pulled."""
    call("ip", "-n", host.name, "link", "set", "eth0", "down")


def cut_between(one, other):
    """Frames to each other go to an address that no host has; all others arrive."""
    for host, peer in ((one, other), (other, one)):
        call("ip", "-n", host.name, "neigh", "replace", peer.address, "lladdr", "02:00:00:00:00:77",
             "dev", "eth0", "nud", "permanent")  # fmt: skip


class Rank:
    """A process, what it says, and when it has said that it ends."""

    def __init__(self, process):
        self.process, self.said, self.failed_at = process, "", None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        for line in self.process.stderr:
            self.said += line
            if line.startswith("error:"):
                self.failed_at = time.monotonic()

    def ends(self, seconds):
        code = self.process.wait(seconds)
        self._thread.join(10)
        return code


@pytest.mark.parametrize("start", ["torchrun", "cluster"])
@pytest.mark.parametrize("what", ["a host", "a link"])
def test_a_cut_ends_all_ranks(tmp_path, start, what, capsys):
    model = write_speaking(tmp_path / "m", "0123456789 ", endless=True, layers=3)
    key = tmp_path / "cluster.key"
    keygen = [sys.executable, "-m", "torch_q4metal.cluster", "keygen", key]
    subprocess.run(keygen, check=True, capture_output=True)
    app = ["--model", model, "--prompt", "x", "-n", 10**7, "--stage-timeout", TIMEOUT]
    with network(tmp_path, 3, 0.001) as hosts:
        ranks = [Rank(host.start(*command(start, hosts, host, key), *app)) for host in hosts]
        while "0123" not in ranks[0].process.stdout.read(4):
            assert ranks[0].process.poll() is None, ranks[0].said
        threading.Thread(target=ranks[0].process.stdout.read, daemon=True).start()
        begin = time.monotonic()
        if what == "a host":
            cut_off(hosts[1])
        else:
            cut_between(hosts[1], hosts[2])
        more = TORCHRUN if start == "torchrun" else 0
        codes = [rank.ends(TIMEOUT + 10 + more) for rank in ranks]
        took = time.monotonic() - begin
    assert 0 not in codes
    said = ranks[0].said
    named = ("rank 1 on",) if what == "a host" else ("rank 1 on", "rank 2 on")
    assert any(f"error: {name}" in said for name in named), said
    assert "has not answered for" in said
    noticed = ranks[0].failed_at - begin
    assert noticed < TIMEOUT + 2
    with capsys.disabled():
        print(f"\n{start}, {what}: told after {noticed:.1f} s of {TIMEOUT}, ended after {took:.1f}")
