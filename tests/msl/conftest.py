"""Where the executor can't run, the tests of Metal text are left out; the report's head says so."""

import platform
import sys

RUNS_HERE = sys.platform == "linux" and platform.machine() == "x86_64"
collect_ignore_glob = [] if RUNS_HERE else ["test_*.py"]


def pytest_report_header() -> str:
    """What stands in the first lines of pytest's output."""
    return "" if RUNS_HERE else "tests/msl is left out: its executor runs on x86-64 Linux only"
