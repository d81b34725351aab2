"""The chat as people meet it: in a real pseudo-terminal, and through pipes.

The models say a fixed text (speaking.py), so that what has to appear is known.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest
from speaking import write_speaking

TIMEOUT = 60  # seconds; only a failure takes so long
UP, CTRL_L = "\x1b[A", "\x0c"
PASTE, END_OF_PASTE = "\x1b[200~", "\x1b[201~"
STATISTICS = re.compile(
    r"prompt \d+ tok( \(\+\d+ cached\))? @ [\d.]+ tok/s, "
    r"generation \d+ tok @ [\d.]+ tok/s, peak memory [\d.]+ GB\n"
)


@pytest.fixture(scope="module")
def paris(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaking(tmp_path_factory.mktemp("models") / "paris", "Pariş.")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "endless"
    return write_speaking(path, "0123456789 ", endless=True)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing of this user is read or written."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("Q4METAL_")}
    state = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    return kept | state | {"TERM": "xterm", "HF_HUB_OFFLINE": "1"}


def command(*arguments: str | Path) -> list[str]:
    chat = [sys.executable, "-m", "torch_q4metal.chat", "--threads", "1"]
    return [*chat, *map(str, arguments)]


def run_chat(
    env: dict[str, str], *arguments: str | Path, text: bytes = b""
) -> subprocess.CompletedProcess[str]:
    """Run it with ``text`` piped in."""
    done = subprocess.run(
        command(*arguments), input=text, capture_output=True, env=env, timeout=TIMEOUT
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, env: dict[str, str], *arguments: str | Path) -> None:
        program, *rest = command(*arguments)
        self.child = pexpect.spawn(
            program, rest, env=env, timeout=TIMEOUT, encoding="utf-8", dimensions=(40, 120)
        )
        self.child.delaybeforesend = None
        self.await_prompt()

    def await_prompt(self) -> str:
        """What comes before the next ``>>>`` that waits for input, which switches pasting on."""
        self.child.expect_exact("\x1b[?2004h")
        shown = self.child.before
        self.child.expect_exact(">>>")
        return shown.replace("\r", "")

    def type(self, text: str) -> None:
        self.child.send(text)

    def ask(self, text: str) -> str:
        """What appears between sending ``text`` and the next prompt."""
        self.type(f"{text}\r")
        self.child.expect_exact("\x1b[?2004l")
        return self.await_prompt()

    def expect(self, text: str) -> None:
        self.child.expect_exact(text)

    def end(self) -> int:
        """The exit code."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


def test_a_conversation(env: dict[str, str], paris: Path, tmp_path: Path) -> None:
    terminal = Terminal(env, "--model", paris)
    assert "Pariş.\n" in terminal.ask("What is the capital of France?")
    assert "Pariş.\n" in terminal.ask("Say it again.")
    statistics = terminal.ask("/stats")
    assert STATISTICS.search(statistics)
    assert "cached" in statistics
    assert "4 messages" in statistics

    assert "(max-tokens 3 reached" in terminal.ask("/set max-tokens 3") + terminal.ask("Again.")
    assert "must be at least 0" in terminal.ask("/set temp -1")
    assert "no command /nonsense" in terminal.ask("/nonsense")
    said = terminal.ask("/help")
    for name in ("/reset", "/system", "/save", "/load", "/set", "/stats", "/exit"):
        assert name in said
    assert max(len(line) for line in said.splitlines() if line.startswith("  ")) <= 80

    saved = tmp_path / "chat.json"
    assert "saved to" in terminal.ask(f"/save {saved}")
    assert len(json.loads(saved.read_text())["messages"]) == 6
    assert "new conversation" in terminal.ask("/reset")
    assert "error: cannot load" in terminal.ask("/load nowhere.json")
    assert "0 messages" in terminal.ask("/stats")
    assert "6 messages loaded" in terminal.ask(f"/load {saved}")
    assert "6 messages" in terminal.ask("/stats")

    terminal.ask("/system Be brief.")
    assert "Be brief." in terminal.ask("/system")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(
    env: dict[str, str], endless: Path, tmp_path: Path
) -> None:
    options = ("--max-tokens", "60000", "--stats", "--no-history")
    terminal = Terminal(env, "--model", endless, *options)
    terminal.type("Count.\r")
    terminal.expect("0123456789 0123456789")
    terminal.child.sendintr()
    terminal.expect("(stopped")
    terminal.await_prompt()

    terminal.type("half a line")
    terminal.child.sendintr()  # at the prompt: gone is the line, not the chat
    terminal.expect("/exit leaves")
    terminal.await_prompt()
    assert "max-tokens" in terminal.ask("/set max-tokens 12")
    answer = terminal.ask("Once more.")
    assert "0123456789 0\n" in answer
    assert "cached)" in answer
    assert "4 messages" in terminal.ask("/stats")

    terminal.ask("/set max-tokens 1000")
    terminal.type("And more.\r")
    terminal.expect("0123456789 0123456789")
    terminal.type("/system\r")  # ahead: read when the answer is over, and not shown within it
    assert "/system" not in terminal.await_prompt()
    terminal.expect("(no system prompt)")
    terminal.await_prompt()
    terminal.type("/exit\r")
    assert terminal.end() == 0
    assert not (tmp_path / "state").exists()


def test_history_and_several_lines(env: dict[str, str], paris: Path, tmp_path: Path) -> None:
    history = tmp_path / "state" / "torch_q4metal" / "chat_history"
    terminal = Terminal(env, "--model", paris, "--quiet")
    terminal.ask("remember me")
    terminal.type('"""first\r')
    terminal.expect("...")
    terminal.type('/help"""\r')
    terminal.expect("Pariş.")
    terminal.await_prompt()
    terminal.type(f"{PASTE}pasted\nlines{END_OF_PASTE}")
    terminal.expect("lines")
    terminal.type("\r")
    terminal.expect("Pariş.")
    terminal.await_prompt()
    saved = tmp_path / "chat.json"
    terminal.ask(f"/save {saved}")
    said = [message["content"] for message in json.loads(saved.read_text())["messages"]]
    assert said[::2] == ["remember me", "first\n/help", "pasted\nlines"]
    terminal.type(CTRL_L)
    terminal.expect("\x1b[2J")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "+remember me\n" in history.read_text()

    terminal = Terminal(env, "--model", paris)
    terminal.type(f"{UP}\r")  # the /save of the session before, now of no messages
    terminal.expect("saved to")
    terminal.await_prompt()
    assert json.loads(saved.read_text())["messages"] == []
    terminal.type("\x04")
    assert terminal.end() == 0


def test_a_model_cannot_steer_the_terminal(env: dict[str, str], tmp_path: Path) -> None:
    path = write_speaking(tmp_path / "model", "\x1b[2J\x07\x9bok")
    terminal = Terminal(env, "--model", path)
    assert "␛[2J␇\ufffdok\n" in terminal.ask("hello")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_piped_text_is_answered_once(env: dict[str, str], paris: Path) -> None:
    done = run_chat(env, "--model", paris, text=b"What is\nthe capital?\n")
    assert (done.returncode, done.stdout) == (0, "Pariş.\n")
    assert STATISTICS.fullmatch(done.stderr)


def test_one_answer_as_json_without_reading_standard_input(
    env: dict[str, str], paris: Path
) -> None:
    with subprocess.Popen(
        command("--model", paris, "--json", "--quiet", "--max-tokens", "2", "-p", "Hi"),
        env=env,
        stdin=subprocess.PIPE,  # stays open: reading it would wait forever
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.wait(TIMEOUT) == 0
        answer = json.loads(child.stdout.read())
        assert child.stderr.read() == b""
    assert answer["text"] == "Pa"
    assert answer["finish_reason"] == "length"
    assert answer["completion_tokens"] == 2
    assert answer["prompt_tokens"] > 10


@contextmanager
def counting(env: dict[str, str], endless: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A single answer without end that has begun."""
    with subprocess.Popen(
        command("--model", endless, "-n", "60000", "-p", "Count."),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdout.read(11) == b"0123456789 "
        yield child


def test_a_closed_pipe_ends_it_quietly(env: dict[str, str], endless: Path) -> None:
    with counting(env, endless) as child:
        child.stdout.close()
        assert child.wait(TIMEOUT) == 141
        assert child.stderr.read() == b""


def test_ctrl_c_ends_a_single_answer(env: dict[str, str], endless: Path) -> None:
    with counting(env, endless) as child:
        child.send_signal(signal.SIGINT)
        assert child.stdout.read().endswith(b"\n")
        assert child.wait(TIMEOUT) == 130
        assert child.stderr.read() == b""


MISTAKES: list[tuple[list[str], bytes, int, str]] = [
    ([], b"", 2, "standard input is empty"),
    (["-p", "-"], b" \n", 2, "standard input is empty"),
    (["-p", ""], b"", 2, "--prompt"),
    (["--temp", "-1"], b"hi", 2, "--temp"),
    (["--ignore-chat-template", "--system-prompt", "x"], b"hi", 2, "--system-prompt"),
    ([], b"hi\xff", 1, "0xff"),
    (["--model", "./nowhere"], b"hi", 1, "nowhere"),
]


def test_mistakes_are_told_without_a_traceback(env: dict[str, str]) -> None:
    """Exit code 2 for how it was called, 1 and one line for what was found."""
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda case: run_chat(env, *case[0], text=case[1]), MISTAKES))
    for done, (_, _, code, words) in zip(runs, MISTAKES, strict=True):
        assert done.returncode == code
        assert done.stdout == ""
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        if code == 1:
            assert re.fullmatch(r"error: [^\n]*\.\n", done.stderr)


def test_help_needs_no_torch(env: dict[str, str]) -> None:
    """Importing torch takes seconds; help should take half of one."""
    timed = [sys.executable, "-X", "importtime", *command("--help")[1:]]
    done = subprocess.run(timed, capture_output=True, env=env, timeout=TIMEOUT, text=True)
    assert done.returncode == 0
    assert "--system-prompt" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "numpy", "tokenizers", "huggingface_hub", "prompt_toolkit"}
