"""Ranks that `torch_q4metal.cluster run` starts: real processes on loopback."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from zmq_ring import free_address

WORDS = [sys.executable, "-m", "torch_q4metal.cluster"]


def environment():
    paths = os.pathsep.join(path for path in sys.path if path)
    return {"OMP_WAIT_POLICY": "PASSIVE"} | dict(os.environ) | {"PYTHONPATH": paths}


class Ranks:
    """The processes of one ring, each with its output so far."""

    def __init__(self, key, world_size, *app):
        self.address, self.world_size, self.app = free_address(), world_size, app
        self.key = key
        self.processes, self.errors = {}, {}

    def words(self, rank):
        return [
            *WORDS, "run", "--rank", str(rank), "--world-size", str(self.world_size),
            "--connect", str(self.address), "--key", str(self.key),
            "--join-timeout", "100", "--", *map(str, self.app),
        ]  # fmt: skip

    def start(self, rank):
        process = subprocess.Popen(
            self.words(rank), env=environment(), text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.processes[rank], self.errors[rank] = process, []
        threading.Thread(target=self._read, args=(process, self.errors[rank]), daemon=True).start()
        return process

    def _read(self, process, lines):
        lines.extend(iter(process.stderr.readline, ""))

    def wait_for(self, rank, text):
        """Returns when a process has said this on stderr."""
        deadline = time.monotonic() + 100
        while text not in "".join(self.errors[rank]):
            assert time.monotonic() < deadline, self.errors
            time.sleep(0.02)

    def end(self, rank):
        """(exit status, standard output) of a process that ends by itself."""
        process = self.processes[rank]
        output = process.stdout.read()
        return process.wait(60), output

    def kill(self):
        for process in self.processes.values():
            process.kill()
            process.wait()


def listening(pid):
    """The addresses that a process listens on, as in /proc/net/tcp: hexadecimal, with the port."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith("socket:["):
            sockets.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                found.append(fields[1])
    return found
