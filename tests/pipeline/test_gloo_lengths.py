"""Messages with their length ahead, over links that take only what has exactly a buffer's size.

Such a link is gloo's on macOS; where it would wait for ever, the one here says so.
"""

import queue

import pytest
import torch

from torch_q4metal.errors import PipelineError
from torch_q4metal.pipeline.gloo_lengths import BYTES_TAG, Inbox, Sent


class ExactLink:
    """Each tag is a queue; the sender of a message waits until it is taken."""

    def __init__(self):
        self._sent = {0: queue.SimpleQueue(), 1: queue.SimpleQueue()}

    def send(self, tensor, tag):
        taken = queue.SimpleQueue()
        self._sent[tag].put((tensor, taken))
        return Work(lambda: taken.get(timeout=10))

    def receive(self, tensor, tag):
        def take():
            message, taken = self._sent[tag].get(timeout=10)
            if len(message) != len(tensor):
                raise PipelineError(f"{len(message)} bytes for a buffer of {len(tensor)}")
            tensor.copy_(message)
            taken.put(True)

        return Work(take)


class Work:
    def __init__(self, wait):
        self.wait = wait


def message_of(size, first):
    return (torch.arange(size) + first).to(torch.uint8)


def test_messages_of_any_length_arrive_in_their_order():
    link = ExactLink()
    inbox = Inbox(link.receive)
    buffers = [torch.zeros(1000, dtype=torch.uint8) for _ in range(3)]
    coming = [inbox.receive(buffer) for buffer in buffers]
    messages = [message_of(size, first) for size, first in ((1000, 1), (1, 7), (333, 50))]
    for message in messages:
        Sent(link.send, message).wait()  # nobody waits for the receives yet
    for transfer in reversed(coming):
        transfer.wait()
        transfer.wait()
    for buffer, message in zip(buffers, messages, strict=True):
        assert torch.equal(buffer[: len(message)], message)
        assert not buffer[len(message) :].any()


def test_a_message_that_is_too_long_is_refused():
    link = ExactLink()
    transfer = Inbox(link.receive).receive(torch.zeros(9, dtype=torch.uint8))
    Sent(link.send, message_of(10, 0))
    with pytest.raises(PipelineError, match="of 10 bytes came, where at most 9"):
        transfer.wait()


def test_a_link_that_is_gone_is_told_to_who_waits():
    def broken(tensor, tag):
        raise PipelineError("the link to rank 1 is gone")

    transfer = Inbox(broken).receive(torch.zeros(9, dtype=torch.uint8))
    with pytest.raises(PipelineError, match="gone"):
        transfer.wait()


def test_the_link_here_takes_no_shorter_message():
    link = ExactLink()
    link.send(message_of(3, 0), BYTES_TAG)
    with pytest.raises(PipelineError, match="3 bytes for a buffer of 4"):
        link.receive(torch.zeros(4, dtype=torch.uint8), BYTES_TAG).wait()
