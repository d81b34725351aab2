"""Saved conversations: written whole or not at all, and read with suspicion."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from sentence import assert_one_sentence

from torch_q4metal.chat_file import load_messages, save_messages
from torch_q4metal.errors import Q4MetalError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'a "quoted"\nline, é 世界'},
    {"role": "assistant", "content": "yes\x1b"},
]


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save_messages(tmp_path / "chat.json", MESSAGES, "some/model")
    assert load_messages(path) == MESSAGES
    assert json.loads(path.read_text())["model"] == "some/model"
    assert os.listdir(tmp_path) == ["chat.json"]
    assert path.stat().st_mode & 0o077 == 0, "a conversation is private"


def test_a_saved_chat_may_be_replaced_and_other_files_may_not(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    save_messages(path, MESSAGES, "model")
    save_messages(path, MESSAGES[:1], "model")
    assert load_messages(path) == MESSAGES[:1]
    for content in ("precious", '{"kind": "other"}', "[]"):
        path.write_text(content)
        with pytest.raises(Q4MetalError) as caught:
            save_messages(path, MESSAGES, "model")
        assert_one_sentence(caught.value, str(path), "not a saved chat")
        assert path.read_text() == content


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "chat.json", tmp_path / "link.json"
    save_messages(target, [], "model")
    link.symlink_to(target)
    assert save_messages(link, MESSAGES, "model") == target
    assert link.is_symlink()
    assert load_messages(target) == MESSAGES


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = save_messages(tmp_path / "chat.json", MESSAGES[:1], "model")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(Q4MetalError) as caught:
        save_messages(path, MESSAGES, "model")
    assert_one_sentence(caught.value, str(path), "No space left")
    assert load_messages(path) == MESSAGES[:1]
    assert os.listdir(tmp_path) == ["chat.json"]


def test_a_folder_that_is_missing_is_one_sentence(tmp_path: Path) -> None:
    for act in (load_messages, lambda path: save_messages(path, MESSAGES, "model")):
        with pytest.raises(Q4MetalError) as caught:
            act(tmp_path / "nowhere" / "chat.json")
        assert_one_sentence(caught.value, "nowhere", "No such file")


USER = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no list of messages"),
        ('{"messages": {}}', "no list of messages"),
        ({"messages": ["hello"]}, "message 1"),
        ({"messages": [{"role": "user"}]}, "message 1"),
        ({"messages": [USER, USER]}, "message 2"),
        ({"messages": [MESSAGES[0], MESSAGES[0]]}, "message 2"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 1"),
        ({"messages": [USER]}, "no answer"),
    ],
)
def test_what_is_no_saved_chat_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "chat.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(Q4MetalError) as caught:
        load_messages(path)
    assert_one_sentence(caught.value, str(path), "not a saved chat", words)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(Q4MetalError) as caught:
        load_messages(path)
    assert_one_sentence(caught.value, str(path), "not a saved chat")
