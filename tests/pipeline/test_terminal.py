"""The chat in a pseudo-terminal through the real torchrun, whose workers get no signals from it."""

import pexpect
import pytest
from speaking import write_speaking
from torchrun import Terminal

CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "endless"
    return write_speaking(path, "0123456789 ", endless=True, layers=2)


def test_ctrl_c_stops_answers_and_ctrl_d_ends_all_ranks(tmp_path, endless):
    terminal = Terminal(tmp_path, endless)
    terminal.expect("Ctrl-D leaves", ">>>")
    for _ in range(2):
        terminal.send("count\r")
        terminal.expect("0123456789 012")
        terminal.send(CTRL_C)
        terminal.expect("(stopped; the answer is kept", ">>>")
    terminal.send("again\r")
    terminal.expect("0123456789 012")
    terminal.send("/stats\r")  # waits for the prompt
    terminal.send(CTRL_C)
    terminal.expect("(stopped", "prompt ", "tok/s", ">>>")
    terminal.send(CTRL_C)
    terminal.expect("(Ctrl-D or /exit leaves)", ">>>")
    terminal.send(CTRL_D)
    terminal.child.expect(pexpect.EOF)
    terminal.wait_restored()
    terminal.child.close()
    assert (terminal.child.exitstatus, terminal.child.signalstatus) == (0, None)
