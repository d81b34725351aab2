"""The interactive chat: what is typed goes to the session, or is a ``/`` command."""

import contextlib
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TextIO

from prompt_toolkit.history import History

from .chat_file import load_messages, save_messages
from .chat_session import ChatSession
from .errors import ContextLengthError, Q4MetalError
from .line_input import FENCE, LineReader, unfence
from .raw_keys import RawKeys
from .terminal import Interrupts, SharedKeys, printable, write_answer

# /set name -> the field of SamplingParams (None: the session's own max_tokens), and its type.
SETTINGS: dict[str, tuple[str | None, type]] = {
    "temp": ("temperature", float),
    "top-p": ("top_p", float),
    "top-k": ("top_k", int),
    "min-p": ("min_p", float),
    "repetition-penalty": ("repetition_penalty", float),
    "seed": ("seed", int),
    "max-tokens": (None, int),
}

_COMMAND = re.compile(r"/([A-Za-z?]+)(?:\s+(.*))?", re.DOTALL)


class Repl:
    """Reads, answers, repeats, until Ctrl-D or ``/exit``. Answers go to stdout, the rest to stderr.

    Ctrl-C stops an answer and never leaves. ``signals``: whether the terminal may send it as a
    signal; under torchrun it would reach torchrun, see ``raw_keys``.
    """

    def __init__(
        self,
        session: ChatSession,
        history: History,
        *,
        model_name: str,
        show_stats: bool = False,
        quiet: bool = False,
        debug: bool = False,
        signals: bool = True,
        notices: TextIO | None = None,
    ) -> None:
        self.session = session
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "this list", self._help),
            "reset": ("", "start a new conversation", self._reset),
            "system": ("[TEXT]", 'show or change the system prompt ("" for none)', self._system),
            "save": ("FILE", "write the conversation to a JSON file", self._save),
            "load": ("FILE", "go on with a saved conversation", self._load),
            "set": ("[NAME VALUE]", "show all settings, or change one", self._set),
            "stats": ("[on|off]", "what the last answer cost; or show it always", self._stats),
            "exit": ("", "leave (so does Ctrl-D)", self._exit),
        }
        self._reader = LineReader(history, [f"/{name}" for name in self.commands])
        self._interrupts = Interrupts()
        self._keys = SharedKeys() if signals else RawKeys()
        self._model_name, self._show_stats, self._quiet = model_name, show_stats, quiet
        self._debug = debug
        self._notices = notices if notices is not None else sys.stderr
        self._leaving = False

    def run(self) -> None:
        """Serve the terminal until the person leaves."""
        self._notice(
            f"{self._model_name}, a context of {self.session.context} tokens; /help lists the "
            "commands, Ctrl-D leaves"
        )
        with self._keys, self._interrupts:
            while not self._leaving:
                try:
                    self._handle(self._reader.read())
                except KeyboardInterrupt:
                    self._notice("(Ctrl-D or /exit leaves)")
                except EOFError:
                    self._leaving = True

    def _handle(self, entry: str) -> None:
        command = _COMMAND.fullmatch(entry.strip())
        try:
            if command:
                self._run_command(command[1], (command[2] or "").strip())
            elif text := unfence(entry).strip("\n"):
                self._answer(text)
        except ContextLengthError as error:
            self._error(f"{error} Nothing is lost: /save FILE keeps it, /reset starts a new one.")
        except Q4MetalError as error:
            self._error(str(error))
        except BrokenPipeError:
            raise
        except Exception as error:  # a bug or a full disk should not take the conversation along
            if self._debug:
                raise
            self._error(f"{type(error).__name__}: {error}")

    def _answer(self, text: str) -> None:
        written = "\n"
        try:
            self._interrupts.arm()
            kept_back = self._keys.kept_back(self._reader.input)
            with kept_back, contextlib.closing(self.session.ask(text)) as pieces:
                for piece in pieces:
                    written = piece
                    write_answer(piece)
                    if self._interrupts.requested:
                        break
        except KeyboardInterrupt:
            pass
        finally:
            self._interrupts.disarm()
            if not written.endswith("\n"):
                write_answer("\n")
        self._after_answer()

    def _after_answer(self) -> None:
        last = self.session.last
        if last is None:
            self._notice("(stopped before the answer began; the message is not kept)")
        elif last.finish_reason == "interrupted":
            self._notice("(stopped; the answer is kept as far as it came)")
        elif last.finish_reason == "length":
            self._notice(f"(max-tokens {self.session.max_tokens} reached; /set max-tokens N)")
        elif last.finish_reason == "context":
            self._notice(f"(the context of {self.session.context} tokens is full; /reset)")
        if last is not None and self._show_stats:
            self._notice(str(last))

    def _run_command(self, name: str, argument: str) -> None:
        name = {"bye": "exit", "quit": "exit", "?": "help"}.get(name, name)
        if name not in self.commands:
            self._error(
                f"there is no command /{name}; /help lists them, "
                f"and {FENCE}/{name}{FENCE} sends it as a message."
            )
            return
        usage, _, run = self.commands[name]
        if name in ("system", "save", "load") and not self.session.use_template:
            self._error(f"/{name} has no use with --ignore-chat-template, which keeps no messages.")
        elif argument and not usage:
            self._error(f"/{name} takes nothing after it.")
        elif usage and not usage.startswith("[") and not argument:
            self._error(f"/{name} needs a {usage.lower()}: /{name} {usage}.")
        else:
            run(argument)

    def _help(self, _: str) -> None:
        for name, (usage, meaning, _run) in self.commands.items():
            self._say(f"  {f'/{name} {usage}':<20} {meaning}")
        self._say(f"  {FENCE:<20} begins and ends several lines; Alt-Enter adds a line")
        self._say(f"  {'Ctrl-C':<20} stops an answer; the conversation goes on")
        self._say(f"  {'Ctrl-L':<20} clears the screen")

    def _reset(self, _: str) -> None:
        self.session.reset()
        self._notice("(new conversation)")

    def _system(self, argument: str) -> None:
        if not argument:
            self._say(self.session.system_prompt or "(no system prompt)")
            return
        text = unfence(argument)
        self.session.system_prompt = None if text in ('""', "''") else text
        self._notice("(system prompt set)" if self.session.system_prompt else "(no system prompt)")

    def _save(self, argument: str) -> None:
        path = save_messages(argument, self.session.messages, self._model_name)
        self._notice(f"(saved to {path})")

    def _load(self, argument: str) -> None:
        messages = load_messages(argument)
        self.session.reset()
        self.session.messages = messages
        self._notice(f"({len(messages)} messages loaded)")

    def _set(self, argument: str) -> None:
        if not argument:
            for name in SETTINGS:
                self._say(f"  {name:<20} {self._setting(name)}")
            return
        name, _, value = argument.partition(" ")
        if name not in SETTINGS:
            self._error(f"there is no setting {name}; there are {', '.join(SETTINGS)}.")
            return
        if value.strip():
            self._change(name, value.strip())
        self._say(f"  {name:<20} {self._setting(name)}")

    def _setting(self, name: str) -> object:
        field, _ = SETTINGS[name]
        return getattr(self.session.sampling, field) if field else self.session.max_tokens

    def _change(self, name: str, value: str) -> None:
        field, kind = SETTINGS[name]
        try:
            number: Any = None if field == "seed" and value == "none" else kind(value)
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise Q4MetalError(f"{name} is {noun}, not {value}.") from None
        if field:
            self.session.sampling = replace(self.session.sampling, **{field: number})
        elif number < 1:
            raise Q4MetalError(f"max-tokens is at least 1, not {number}.")
        else:
            self.session.max_tokens = number

    def _stats(self, argument: str) -> None:
        if argument in ("on", "off"):
            self._show_stats = argument == "on"
            self._notice(f"(statistics after each answer: {argument})")
        elif argument:
            self._error(f"/stats takes on or off, not {argument}.")
        else:
            self._say(str(self.session.last or "(no answer yet)"))
            held, context = self.session.cached_tokens, self.session.context
            self._say(f"context {held} of {context} tok, {len(self.session.messages)} messages")

    def _exit(self, _: str) -> None:
        self._leaving = True

    def _say(self, text: str) -> None:
        print(printable(text), file=self._notices, flush=True)

    def _notice(self, text: str) -> None:
        if not self._quiet:
            self._say(text)

    def _error(self, text: str) -> None:
        self._say(f"error: {text}")
