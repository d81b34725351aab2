"""Lines typed at a terminal: prompt, editing, history file, ``\"\"\"`` blocks and pasted lines."""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from .environment import NO_HISTORY

log = logging.getLogger(__name__)

FENCE = '"""'
HISTORY_ENTRIES = 1000
_COMMAND_WORD = re.compile(r"^/\w+\s+")


class LineReader:
    """Reads what a person types; one per terminal."""

    def __init__(self, history: History, completions: Iterable[str] = ()) -> None:
        output = create_output(always_prefer_tty=True)  # stderr where stdout goes to a file
        if isinstance(output, Vt100_Output):
            # Asking where the cursor is only serves menus, and a late reply would be echoed
            # into an answer that begins at once.
            output.enable_cpr = False
        self._session: PromptSession[str] = PromptSession(
            ">>> ",
            history=history,
            output=output,
            multiline=True,
            prompt_continuation="... ",
            key_bindings=_bindings(),
            completer=WordCompleter(list(completions), sentence=True),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_suspend=True,
        )

    @property
    def input(self) -> Input:
        """Where keys come from."""
        return self._session.input

    def read(self) -> str:
        """The next entry as it was typed, a ``\"\"\"`` block with its fences.

        Raises KeyboardInterrupt for Ctrl-C and EOFError for Ctrl-D on an empty line.
        """
        return self._session.prompt()


def is_open(text: str) -> bool:
    """Whether ``text`` begins a ``\"\"\"`` block, after a command or not, and does not end it."""
    start = _COMMAND_WORD.sub("", text.lstrip())
    return start.startswith(FENCE) and not start[len(FENCE) :].rstrip().endswith(FENCE)


def unfence(text: str) -> str:
    """``text`` without the fences of a closed ``\"\"\"`` block and the line ends next to them."""
    if not text.lstrip().startswith(FENCE) or is_open(text):
        return text
    inside = text.strip()[len(FENCE) : -len(FENCE)]
    return inside.removeprefix("\n").removesuffix("\n")


def open_history(enabled: bool = True) -> History:
    """The history kept in the user's state folder, or one in memory where that is switched off."""
    if not enabled or NO_HISTORY.get():
        return InMemoryHistory()
    return PrivateHistory(user_state_path("torch_q4metal", appauthor=False) / "chat_history")


class PrivateHistory(FileHistory):
    """A history file that only its owner can read, cut to its newest entries when it has grown.

    A file that cannot be read or written costs one warning, never the chat.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._warned = False

    def load_history_strings(self) -> Iterable[str]:
        """Newest first, at most ``HISTORY_ENTRIES``."""
        try:
            newest = list(super().load_history_strings())
            if len(newest) > 2 * HISTORY_ENTRIES:
                self._rewrite(newest[:HISTORY_ENTRIES])
        except OSError as error:
            self._warn(error)
            return []
        return newest[:HISTORY_ENTRIES]

    def store_string(self, string: str) -> None:
        """Append one entry."""
        try:
            self._create()
            super().store_string(string)
        except OSError as error:
            self._warn(error)

    def _create(self) -> None:
        path = Path(os.fsdecode(self.filename))
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))

    def _rewrite(self, newest: list[str]) -> None:
        os.unlink(self.filename)
        self._create()
        for string in reversed(newest):
            super().store_string(string)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            log.warning("the history file %s is not kept: %s", self.filename, error.strerror)
        self._warned = True


def _bindings() -> KeyBindings:
    """Enter sends, except inside an open block; Alt-Enter always starts a new line."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings
