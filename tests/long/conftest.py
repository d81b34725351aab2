"""Slow tests. `make test` leaves this folder out; name it to run them: ``pytest tests/long``."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_ignore_collect(config):
    named = (Path(str(argument).split("::")[0]).resolve() for argument in config.args)
    if any(path == FOLDER or FOLDER in path.parents for path in named):
        return None
    return True


def pytest_collection_modifyitems(items):
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.long)
            item.add_marker(pytest.mark.timeout(1800))
