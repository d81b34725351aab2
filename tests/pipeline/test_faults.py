"""A rank that is killed, stopped or differs: how all others end, and how soon. More: tests/long."""

import signal

import pytest
import tiny
from faulty_ranks import assert_all_end, assert_refused


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write_tiny(tmp_path_factory.mktemp("m") / "m", layers=3).path


@pytest.mark.parametrize(("number", "what", "start"), [
    (signal.SIGKILL, "endless", "torchrun"), (signal.SIGSTOP, "idle", "cluster"),
])  # fmt: skip
def test_a_lost_rank_ends_all_and_is_named(path, number, what, start, capsys):
    assert_all_end(path, number, what, start, capsys)


def test_another_precision_is_refused(path):
    sentence = "another precision than rank 0"
    assert_refused([path] * 2, "cluster", sentence, "int8, not fast", precisions=["fast", "int8"])
