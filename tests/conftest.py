"""Shared settings: the same random tensors and examples in every run, and no network.

tests/long and tests/system run only where they are named: ``pytest tests/long``.
"""

import os
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


PLANTED = pytest.StashKey[list[str]]()


@pytest.fixture
def planted(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Notes a bug that the test planted and the words that told of it: the output lists them."""

    def note(bug: str, found: object) -> None:
        words = str(found).strip().splitlines()
        request.config.stash.setdefault(PLANTED, []).append(f"{bug}: {words[0][:120]}")

    return note


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if bugs := config.stash.get(PLANTED, []):
        terminalreporter.section(f"{len(bugs)} planted bugs, each found")
        for bug in bugs:
            terminalreporter.write_line(bug)


SLOW_FOLDERS = [Path(__file__).with_name(name) for name in ("long", "system")]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path not in SLOW_FOLDERS:
        return None
    named = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    if any(path == collection_path or collection_path in path.parents for path in named):
        return None
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(folder in item.path.parents for folder in SLOW_FOLDERS):
            item.add_marker(pytest.mark.long)
            item.add_marker(pytest.mark.timeout(1800))
