"""A rank that is killed or stopped: how all others end, and how soon. tests/long has the rest."""

import signal

import pytest
import tiny
from faulty_ranks import assert_all_end


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write_tiny(tmp_path_factory.mktemp("m") / "m", layers=3).path


@pytest.mark.parametrize(("number", "what"), [
    (signal.SIGKILL, "endless"), (signal.SIGSTOP, "idle"),
])  # fmt: skip
def test_a_lost_rank_ends_all_and_is_named(path, number, what, capsys):
    assert_all_end(path, number, what, capsys)
