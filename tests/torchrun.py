"""The apps under the real torchrun, on loopback: through pipes, and in a pseudo-terminal."""

import os
import subprocess
import sys
import termios
import time
from pathlib import Path

import pexpect

# Alone it would take the machine's own name, which on macOS often means no address.
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"
]  # fmt: skip


def _environment() -> dict[str, str]:
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | dict(os.environ)
    return environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def run_torchrun(
    *words: str | Path, processes: int, text: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs it to its end, with ``text`` piped in."""
    return subprocess.run(
        [*TORCHRUN, "--nproc-per-node", str(processes), *map(str, words)],
        env=_environment(), input=text, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def start_torchrun(*words: str | Path, processes: int) -> subprocess.Popen[str]:
    """Starts it, with nothing on standard input; its output is piped."""
    return subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node", str(processes), *map(str, words)],
        env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


class Terminal:
    """A chat of two ranks in a pseudo-terminal."""

    def __init__(self, home: Path, model: Path) -> None:
        environment = _environment()
        environment |= {"HOME": str(home), "XDG_STATE_HOME": str(home), "TERM": "xterm"}
        program, *words = [*TORCHRUN, "--nproc-per-node", "2"]
        words += ["-m", "torch_q4metal.chat", "--model", str(model), "-n", "100000"]
        self.child = pexpect.spawn(
            program, words, env=environment, timeout=120, encoding="utf-8",
            dimensions=(40, 120),
        )  # fmt: skip
        self.modes = termios.tcgetattr(self.child.child_fd)

    def send(self, keys: str) -> None:
        self.child.send(keys)

    def expect(self, *texts: str) -> None:
        """All of these in this order."""
        for text in texts:
            self.child.expect_exact(text)

    def wait_restored(self) -> None:
        """Returns when the terminal is as it was before."""
        deadline = time.monotonic() + 10
        while termios.tcgetattr(self.child.child_fd) != self.modes:
            assert time.monotonic() < deadline
            time.sleep(0.01)
