"""Messages over gloo with their length ahead of them, for a gloo that takes no shorter ones.

Gloo's libuv transport, the only one that torch has on macOS, reads as many bytes as the receiver's
buffer has, and waits for ever where fewer were sent (gloo/transport/uv/pair.cc, ``Pair::onRead``).
So there each message is two: its length, and then exactly its bytes. A thread posts the second
receive when the first is through: a sender waits for no caller on the other side, as transport.py
says.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import PipelineError
from .transport import Transfer

LENGTH_TAG, BYTES_TAG = 0, 1  # lengths run ahead of the bytes that they announce

_CLOSING = 1.0  # seconds to let the thread end

Begin = Callable[[Tensor, int], Transfer]
"""Starts to send or to receive a tensor of exactly its size, with a tag."""


class Sent:
    """A message on its way out."""

    def __init__(self, begin: Begin, message: Tensor) -> None:
        length = torch.tensor([len(message)], dtype=torch.int64)
        self._parts = [begin(length, LENGTH_TAG), begin(message, BYTES_TAG)]

    def wait(self) -> None:
        for part in self._parts:
            part.wait()


class Inbox:
    """The messages that come from one rank. ``begin`` receives from it."""

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._buffers: queue.SimpleQueue[_Incoming | None] = queue.SimpleQueue()
        # A daemon: it may wait for a message that never comes when the process ends.
        self._thread = threading.Thread(target=self._fill, name="gloo inbox", daemon=True)
        self._thread.start()
        # A thread that comes out of gloo while Python is being torn down ends the process.
        atexit.register(self.close)

    def receive(self, buffer: Tensor) -> Transfer:
        incoming = _Incoming(buffer)
        self._buffers.put(incoming)
        return incoming

    def close(self) -> None:
        """Nothing is received any more, unless the thread waits for a message now."""
        atexit.unregister(self.close)
        self._buffers.put(None)
        self._thread.join(_CLOSING)

    def _fill(self) -> None:
        length = torch.empty(1, dtype=torch.int64)
        while (incoming := self._buffers.get()) is not None:
            try:
                self._begin(length, LENGTH_TAG).wait()
                incoming.take(int(length), self._begin)
            except Exception as error:  # its waiter's, who would wait for ever
                incoming.error = error
            incoming.is_done.set()


class _Incoming:
    """A buffer that waits for its message."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self.error: Exception | None = None
        self.is_done = threading.Event()

    def take(self, size: int, begin: Begin) -> None:
        if not 0 <= size <= len(self._buffer):
            raise PipelineError(
                f"a message of {size} bytes came, where at most {len(self._buffer)} were expected."
            )
        begin(self._buffer[:size], BYTES_TAG).wait()

    def wait(self) -> None:
        self.is_done.wait()
        if self.error is not None:
            raise self.error
