"""The executor under ThreadSanitizer: clean as it is, and not without any one of its barriers."""

import re

import pytest
import sanitized


@pytest.fixture(scope="module")
def program():
    return sanitized.compile_program(sanitized.PORTABLE)


def barriers_of_a_clean_run(program, **environment):
    status, output = sanitized.watch(program, **environment)
    assert status == 0, output
    assert "ThreadSanitizer" not in output
    return int(re.fullmatch(r"(\d+) barriers\n", output).group(1))


def test_no_race_and_a_race_without_any_one_barrier(program, planted):
    count = barriers_of_a_clean_run(program)
    assert count == 5 * 2 + 2  # five steps a layer, the head, argmax
    for i in range(count):
        status, output = sanitized.watch(program, "without", str(i))
        assert status != 0, f"no race without barrier {i}: {output}"
        assert sanitized.RACE in output
        assert "executor_pass.cpp" in output
        removed, _, warning = output.partition("\n")
        planted(f"executor: {removed}", warning.partition("WARNING: ")[2])
