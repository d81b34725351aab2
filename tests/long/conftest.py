"""What long tests share."""

import sys

import pytest

from torch_q4metal.pipeline.key_file import write_key

sys.path.append("tests/pipeline")
from cluster import Ranks


@pytest.fixture
def ranks(tmp_path):
    """A function that gives a ring of processes for an app's command line."""
    write_key(tmp_path / "key")
    made = []

    def make(world_size, *app):
        made.append(Ranks(tmp_path / "key", world_size, *app))
        return made[-1]

    yield make
    for each in made:
        each.kill()
