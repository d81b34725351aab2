"""What machine this is and what this process takes of it: processor name, resident memory."""

import ctypes
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

# Of macOS's struct rusage_info_v4, in words of 64 bits.
RUSAGE_INFO_V4, RUSAGE_WORDS, PEAK_FOOTPRINT = 4, 37, 30


def cpu_name() -> str:
    """The processor's name as its maker writes it, or the architecture where nobody says."""
    if sys.platform == "darwin":
        named = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            text=True,
            check=False,
        )
        return named.stdout.strip() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes; mapped file pages count."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux


def peak_footprint() -> int | None:
    """Most bytes that macOS has counted for this process so far, None on other systems.

    These are its own memory and the GPU's buffers, each page once, and no file that is mapped.
    """
    if sys.platform != "darwin":
        return None
    usage = (ctypes.c_uint64 * RUSAGE_WORDS)()
    if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), RUSAGE_INFO_V4, ctypes.byref(usage)):
        return None
    return int(usage[PEAK_FOOTPRINT])
