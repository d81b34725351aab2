"""Saved conversations: a JSON object of ``kind``, ``model`` and ``messages`` (role, content)."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .chat_session import Message
from .errors import Q4MetalError

KIND = "torch_q4metal chat"


def save_messages(path: str | Path, messages: Sequence[Message], model: str) -> Path:
    """Write ``messages`` to ``path`` at once or not at all; return the absolute path.

    Raises:
        Q4MetalError: the file cannot be written, or is there already and is no saved chat.
    """
    target = Path(path).expanduser().resolve()
    if target.exists() and not _is_saved_chat(target):
        raise Q4MetalError(f"{target} exists and is not a saved chat; choose another name.")
    content = {"kind": KIND, "model": model, "messages": list(messages)}
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise Q4MetalError(f"cannot save the chat to {target}: {error.strerror}.") from error
    return target


def load_messages(path: str | Path) -> list[Message]:
    """The messages of a saved chat: an optional system message, then user and assistant in turn.

    Raises:
        Q4MetalError: the file cannot be read or is not a saved chat.
    """
    source = Path(path).expanduser()
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise Q4MetalError(f"cannot load the chat from {source}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise Q4MetalError(f"{source} is not a saved chat: it is not JSON text.") from error
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        raise Q4MetalError(f"{source} is not a saved chat: it has no list of messages.")
    expected = "system"
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        text = message.get("content") if isinstance(message, dict) else None
        if expected == "system" and role != "system":
            expected = "user"
        if role != expected or not isinstance(text, str):
            raise Q4MetalError(
                f"{source} is not a saved chat: message {number} should be "
                f'{{"role": "{expected}", "content": "..."}}.'
            )
        expected = "assistant" if role == "user" else "user"
    if expected == "assistant":
        raise Q4MetalError(f"{source} is not a saved chat: its last question has no answer.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_saved_chat(path: Path) -> bool:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("kind") == KIND
