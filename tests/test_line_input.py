"""The parts of line input that need no terminal: blocks, the history file, harmless text."""

import logging
import os
import signal
from pathlib import Path

import pytest
from prompt_toolkit.history import InMemoryHistory

from torch_q4metal import line_input
from torch_q4metal.line_input import PrivateHistory, is_open, open_history, unfence
from torch_q4metal.terminal import Interrupts, printable


@pytest.mark.parametrize(
    ("text", "opened", "inside"),
    [
        ("hello", False, "hello"),
        ('say """x"""', False, 'say """x"""'),
        ('"""', True, '"""'),
        ('"""one\ntwo', True, '"""one\ntwo'),
        ('"""one\ntwo"""', False, "one\ntwo"),
        ('  """\none\n\ntwo\n"""  ', False, "one\n\ntwo"),
        ('"""/help"""', False, "/help"),
        ('""""""', False, ""),
        ('/system """Be', True, '/system """Be'),
        ('/system """Be\nbrief."""', False, '/system """Be\nbrief."""'),
    ],
)
def test_blocks(text: str, opened: bool, inside: str) -> None:
    assert is_open(text) == opened
    assert unfence(text) == inside


def test_history_is_kept_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "history"
    history = PrivateHistory(path)
    history.store_string("one")
    history.store_string("two\nlines")
    assert list(PrivateHistory(path).load_history_strings()) == ["two\nlines", "one"]
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


def test_history_does_not_grow_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_input, "HISTORY_ENTRIES", 3)
    path = tmp_path / "history"
    history = PrivateHistory(path)
    for number in range(7):
        history.store_string(str(number))
    assert list(PrivateHistory(path).load_history_strings()) == ["6", "5", "4"]
    assert list(line_input.FileHistory(str(path)).load_history_strings()) == ["6", "5", "4"]
    assert path.stat().st_mode & 0o077 == 0


def test_a_history_that_cannot_be_kept_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    history = PrivateHistory(tmp_path / "file" / "history")
    with caplog.at_level(logging.WARNING):
        history.store_string("one")
        history.store_string("two")
        assert list(history.load_history_strings()) == []
    assert len(caplog.records) == 1
    folder = PrivateHistory(tmp_path)  # a folder where the file should be
    assert list(folder.load_history_strings()) == []


def test_history_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("Q4METAL_NOHISTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert isinstance(open_history(), PrivateHistory)
    assert isinstance(open_history(enabled=False), InMemoryHistory)
    monkeypatch.setenv("Q4METAL_NOHISTORY", "1")
    assert isinstance(open_history(), InMemoryHistory)


def test_nothing_that_a_terminal_obeys_is_left() -> None:
    harmless = "tab\tline\nümlaut 世界 🙂"
    assert printable(harmless) == harmless
    assert printable("a\x1b[2Jb\x07c\x00d") == "a␛[2Jb␇c␀d"
    assert printable("over\rwritten\x7f\x9b31m\x85") == "overwritten␡\ufffd31m\ufffd"
    every = "".join(map(chr, range(0x100)))
    left = {ord(char) for char in printable(every)}
    assert left & {*range(0x20), *range(0x7F, 0xA0)} == {ord("\t"), ord("\n")}


def test_ctrl_c_interrupts_once_and_only_when_armed() -> None:
    previous = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.requested
        interrupts.arm()
        assert not interrupts.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # while the first one is dealt with
        assert interrupts.requested
        interrupts.arm()
        interrupts.disarm()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is previous
