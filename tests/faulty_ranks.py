"""Plain processes that are the ranks of either start, to be killed or stopped.

"torchrun": with the environment that it sets. "cluster": as ``torch_q4metal.cluster run`` does it.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "pipeline"))
from zmq_ring import free_address

from torch_q4metal.pipeline.key_file import write_key

TIMEOUT = 3.0
STARTS = ("torchrun", "cluster")


class Ranks:
    """The processes; ``paths`` and ``precisions`` of each, ``versions`` of the package too."""

    def __init__(self, paths, what="idle", start="torchrun", precisions=None, versions=None):
        self._folder = tempfile.TemporaryDirectory()
        port = free_address().port
        common = dict(os.environ) | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(paths)),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        }  # fmt: skip
        if start == "cluster":
            key = Path(self._folder.name) / "key"
            write_key(key)
            common |= {"CLUSTER_KEY": str(key)}
        script = str(Path(__file__).with_name("fault_rank.py"))
        self.processes = []
        for rank, path in enumerate(paths):
            own = {"RANK": str(rank)}
            own |= {"VERSION": versions[rank]} if versions else {}
            precision = precisions[rank] if precisions else "fast"
            process = subprocess.Popen(
                [sys.executable, script, str(path), str(TIMEOUT), precision, what],
                env=common | own, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )  # fmt: skip
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.communicate()
        self._folder.cleanup()

    def wait_until_ready(self):
        assert self.processes[0].stdout.readline() == "ready\n", self.processes[0].stderr.read()

    def go(self):
        """Lets rank 0 begin, once all are ready."""
        self.wait_until_ready()
        self.processes[0].stdin.write("\n")
        self.processes[0].stdin.flush()

    def ends(self, ranks, seconds=60):
        """(exit code of each, rank 0's stderr, seconds until the last of them had ended)."""
        begin = time.monotonic()
        try:
            codes = [self.processes[rank].wait(seconds) for rank in ranks]
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
            said = [(process.returncode, *process.communicate()) for process in self.processes]
            raise AssertionError(f"some did not end: {said}") from None
        took = time.monotonic() - begin
        return codes, self.processes[0].stderr.read(), took


def assert_all_end(path, number, what, start, capsys):
    """Signal ``number`` to rank 1 of three that do ``what``: the others end, rank 0 names it."""
    with Ranks([path] * 3, what, start) as ranks:
        if what == "endless":
            ranks.go()
        else:
            ranks.wait_until_ready()
        time.sleep(0.3)
        os.kill(ranks.processes[1].pid, number)
        codes, said, took = ranks.ends([0, 2])
        assert codes == [1, 1], said
        words = "has not answered for" if number == signal.SIGSTOP else "has ended"
        assert said.count("error:") == 1
        assert f"error: rank 1 on {socket.gethostname()} {words}" in said
        assert took < TIMEOUT + 3
    with capsys.disabled():
        name = signal.Signals(number).name
        print(f"\n{start}: {name} while {what}: all ended after {took:.1f} s of {TIMEOUT:.0f}")


def assert_refused(paths, start, *sentences, **differences):
    """All ranks end with 1 before rank 0 is ready, and rank 0 says these."""
    with Ranks(paths, "idle", start, **differences) as ranks:
        codes, said, _ = ranks.ends(range(len(paths)))
        assert codes == [1] * len(paths), said
        assert ranks.processes[0].stdout.read() == ""
    for sentence in (*sentences, f"rank 1 on {socket.gethostname()}"):
        assert sentence in said
