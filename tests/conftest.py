"""Shared settings: the same random tensors and examples in every run, and no network.

tests/long and tests/system run only where they are named: ``pytest tests/long``. What else is left
out on a machine stands at the end of the output, with the reason.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Before torch is imported: OpenMP's idle workers would spin on the cores that others need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub must say so

import hypothesis
import torch

hypothesis.settings.register_profile(
    "tests", derandomize=True, deadline=None, max_examples=40, database=None
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def planted(record_property: Callable[[str, object], None]) -> Callable[[str, object], None]:
    """Notes a bug that the test planted and the words that told of it: the output lists them."""

    def note(bug: str, found: object) -> None:
        words = str(found).strip().splitlines()
        record_property("planted", f"{bug}: {words[0][:120]}")

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        LEFT_OUT[report.nodeid] = str(reason).removeprefix("Skipped: ")
    if LEFT_OUT:
        terminalreporter.section("left out on this machine")
        for name, reason in LEFT_OUT.items():
            terminalreporter.write_line(f"{name}: {reason}")
    passed = terminalreporter.stats.get("passed", [])
    properties = [each for report in passed for each in report.user_properties]
    if bugs := [bug for name, bug in properties if name == "planted"]:
        terminalreporter.section(f"{len(bugs)} planted bugs, each found")
        for bug in bugs:
            terminalreporter.write_line(bug)


_PROC = "it reads /proc, which Linux has"
_STANDIN = "it plants slips in the stand-in, of which a Mac has no need"
LEFT_OUT = {
    "tests/msl": "it runs Metal text on x86-64 Linux; here Metal runs it (tests/macos)",
    "tests/macos/test_metal_objc.py": "the .mm files were compiled with the real headers",
    "tests/pipeline/test_torchrun.py::test_each_rank_maps_only_its_own_bytes": _PROC,
    "tests/pipeline/test_torchrun.py::test_a_quarter_of_the_layers_takes_a_quarter_of_the_memory":
        _PROC,
    "tests/pipeline/test_zmq_cluster.py::test_three_processes": _PROC,
    "tests/long/test_metal_host_slips.py": _STANDIN,
    "tests/long/test_pipeline_apps.py::test_a_killed_chat_leaves_the_terminal_as_it_was": _PROC,
    "tests/long/test_pipeline_faults.py::test_torchrun_ends_when_a_rank_stops": _PROC,
    "tests/long/test_zmq_apps.py::test_ctrl_c_stops_answers_and_ctrl_d_ends_all_ranks": _PROC,
} if sys.platform == "darwin" else {}  # fmt: skip

# Begun first: two processes share the files, and a long one at the end would leave one idle.
LONGEST = [
    Path(__file__).parent / name
    for name in (
        "macos/test_bench_mac.py",  # builds the stand-in
        "test_thread_sanitizer.py",
        "test_instruction_sets.py",
        "test_kernel_table.py",
        "test_chat.py",
        "test_loads.py",
        "macos/test_self_check.py",
        "macos/test_metal_generation.py",
        "oracle/test_mlx_models.py",
        "pipeline/test_faults.py",
        "pipeline/test_torchrun.py",
        "pipeline/test_liveness.py",
        "macos/test_metal_objc.py",
    )
]

SLOW_FOLDERS = [Path(__file__).with_name(name) for name in ("long", "system")]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if any(collection_path == config.rootpath / name for name in LEFT_OUT):
        return True
    if collection_path not in SLOW_FOLDERS:
        return None
    named = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    if any(path == collection_path or collection_path in path.parents for path in named):
        return None
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if item.nodeid.partition("[")[0] not in LEFT_OUT]
    items.sort(key=lambda item: LONGEST.index(item.path) if item.path in LONGEST else len(LONGEST))
    for item in items:
        if any(folder in item.path.parents for folder in SLOW_FOLDERS):
            item.add_marker(pytest.mark.long)
            item.add_marker(pytest.mark.timeout(1800))
