"""What carries messages between the stages: a ring of ranks, whatever library moves the bytes.

Each rank sends to the next one (``rank + 1``, the last one to rank 0) and receives from the one
before it. A link delivers whole messages, in the order in which they were sent, without loss; what
is in them is ``message.py``'s business. Nothing here computes or knows a model.

Rules for callers, on which an implementation may rely:

- ``send`` and ``receive`` are called by one thread. Several transfers may be under way on a link.
- The bytes of a message stay as they are, and a receiver's buffer is left alone, until ``wait`` of
  their transfer has returned. A caller keeps every transfer until it has waited for it.
- A buffer is at least as long as the message that arrives in it, and at most ``2**31`` bytes.

Rules for implementations:

- ``send`` and ``receive`` return at once. Bytes move while the caller computes, so a ``receive``
  that waits ahead of its message takes it up without a further round trip.
- A receive may wait for days: an idle chat is no fault. It ends with PipelineError when the link
  is gone (the neighbour's process ended, its connection was cut), never by a clock of its own.
- A message that the receiver has no ``receive`` for yet may hold up its sender's ``wait``; that is
  all the flow control there is.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Transfer(Protocol):
    """One message on its way out or in."""

    def wait(self) -> None:
        """Returns when the message has arrived in the buffer, or its bytes are free to change; at
        once if it has returned before.

        Raises PipelineError, naming the neighbour's rank, if the link is gone.
        """


class Transport(Protocol):
    """One rank's place in the ring. ``world_size`` is at least 2."""

    @property
    def rank(self) -> int:
        """0 drives, ``world_size - 1`` is the last stage."""

    @property
    def world_size(self) -> int:
        """How many ranks the ring has."""

    def send(self, message: Tensor) -> Transfer:
        """Starts to send ``message``, contiguous uint8 [bytes] on the CPU, to the next rank."""

    def receive(self, buffer: Tensor) -> Transfer:
        """Starts to take the next message of the rank before, into ``buffer``, uint8 [capacity].

        The message may be shorter than the buffer; it says itself how long it is. Buffers are
        filled in the order in which they were given.
        """

    def close(self) -> None:
        """Ends both links. Messages that were waited for have been delivered; others may be lost.

        Transfers that are still under way end with PipelineError or not at all.
        """
