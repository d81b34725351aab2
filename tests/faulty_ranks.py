"""Plain processes with the environment that torchrun sets, to be killed or stopped."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TIMEOUT = 2.0


class Ranks:
    """The processes; ``paths`` and ``precisions`` of each."""

    def __init__(self, paths, what="idle", precisions=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = dict(os.environ) | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(paths)),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        }  # fmt: skip
        script = str(Path(__file__).with_name("fault_rank.py"))
        self.processes = [
            subprocess.Popen(
                [sys.executable, script, str(path), str(TIMEOUT), precision, what],
                env=common | {"RANK": str(rank)}, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for rank, (path, precision) in enumerate(
                zip(paths, precisions or ["fast"] * len(paths), strict=True)
            )
        ]  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.wait()

    def go(self):
        """Waits until all are ready, and lets rank 0 begin."""
        assert self.processes[0].stdout.readline() == "ready\n"
        self.processes[0].stdin.write("\n")
        self.processes[0].stdin.flush()

    def ends(self, ranks, seconds=60):
        """(exit code of each, rank 0's stderr, seconds until the last of them had ended)."""
        begin = time.monotonic()
        codes = [self.processes[rank].wait(seconds) for rank in ranks]
        took = time.monotonic() - begin
        return codes, self.processes[0].stderr.read(), took


def assert_all_end(path, number, what, capsys):
    """Signal ``number`` to rank 1 of three that do ``what``: the others end, rank 0 names it."""
    with Ranks([path] * 3, what) as ranks:
        if what == "endless":
            ranks.go()
        else:
            assert ranks.processes[0].stdout.readline() == "ready\n"
        time.sleep(0.3)
        os.kill(ranks.processes[1].pid, number)
        codes, said, took = ranks.ends([0, 2])
        assert codes == [1, 1]
        words = "has not answered for 2 s" if number == signal.SIGSTOP else "has ended"
        assert said.count("error:") == 1
        assert f"error: rank 1 on {socket.gethostname()} {words}" in said
        assert took < TIMEOUT + 3
    with capsys.disabled():
        print(f"\n{signal.Signals(number).name} while {what}: all ended after {took:.1f} s")
