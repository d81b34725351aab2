"""The thread beside a ``ZmqTransport``: who may connect, and which link has been closed.

It uses none of the sockets of the thread that computes. Which rank is to blame for a link that is
gone, and ranks that fall silent, are liveness.py's business.
"""

from __future__ import annotations

import logging
import os
import socket
import threading

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

logger = logging.getLogger(__name__)

DOMAIN = b"torch_q4metal"  # without one libzmq asks nobody whether a key may connect
_EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
)
_FAILED = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
}


class Watch:
    """Admits one key, and hears what becomes of connections.

    ``loss``   the first link that is gone, in words; None while all are well
    ``alarm``  a socket for the thread that computes: readable once there is a ``loss``
    ``rank_0_left``  set when the connection over which this rank has joined is gone
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], public_key: bytes) -> None:
        self.loss: str | None = None
        self.rank_0_left = threading.Event()
        self._keys = KeyCheck(context, public_key)
        self._star: zmq.Socket[bytes] | None = None
        self._inner = context.socket(zmq.PAIR)
        self._inner.bind("inproc://alarm")
        self.alarm = context.socket(zmq.PAIR)
        self.alarm.connect("inproc://alarm")
        self._monitors: dict[zmq.Socket[bytes], _Server | _Client] = {}
        self._thread = threading.Thread(target=self._run, name="links", daemon=True)

    def add_client(
        self, connecting: zmq.Socket[bytes], name: str, refusal: str, is_star: bool = False
    ) -> threading.Event:
        """Before ``start``: watches a socket with one connection, to ``name``.

        ``refusal``  what to say if the other side does not take this rank's key
        Returns what is set once the connection stands.
        """
        monitor = connecting.get_monitor_socket(_EVENTS)
        client = _Client(name, refusal)
        self._monitors[monitor] = client
        self._star = monitor if is_star else self._star
        return client.is_up

    def add_server(self, listening: zmq.Socket[bytes]) -> dict[int, str]:
        """Before ``start``: watches a socket that others connect to.

        Returns descriptor -> name of the connections whose loss matters; the caller adds them.
        """
        server = _Server()
        self._monitors[listening.get_monitor_socket(_EVENTS)] = server
        return server.names

    def start(self) -> None:
        """Until then nobody is admitted."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread. Losses count no more."""
        self.alarm.send(b"")
        self._thread.join()
        self.alarm.close(0)

    def _run(self) -> None:
        poller = zmq.Poller()
        for polled in (self._inner, self._keys.questions, *self._monitors):
            poller.register(polled, zmq.POLLIN)
        try:
            while True:
                for ready, _ in poller.poll():
                    if ready is self._inner:
                        return
                    if ready is self._keys.questions:
                        self._keys.answer()
                    elif loss := self._monitors[ready].hear(ready):
                        self._report(loss)
                        if ready is self._star:
                            self.rank_0_left.set()
        finally:
            self._keys.close()
            for polled in (self._inner, *self._monitors):
                polled.close(0)

    def _report(self, loss: str) -> None:
        if self.loss is None:
            self.loss = loss
            self._inner.send(b"")


class KeyCheck:
    """Answers libzmq's questions whether a key may connect: one may. ``questions``: to be polled"""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], public_key: bytes) -> None:
        self._public_key = z85.decode(public_key)
        self.questions = context.socket(zmq.REP)
        self.questions.bind("inproc://zeromq.zap.01")  # where libzmq asks (RFC 27)

    def answer(self) -> None:
        """Answers one that has come."""
        version, request, _, address, _, mechanism, *credentials = self.questions.recv_multipart()
        is_known = mechanism == b"CURVE" and credentials == [self._public_key]
        if not is_known:
            key = z85.encode(credentials[0]).decode() if credentials else "none"
            logger.warning("refused a connection from %s: unknown key %s", address.decode(), key)
        answer = [b"200", b"OK"] if is_known else [b"400", b"unknown key"]
        self.questions.send_multipart([version, request, *answer, b"", b""])

    def close(self) -> None:
        self.questions.close(0)


class _Client:
    """What happens to a connection that this rank has made."""

    def __init__(self, name: str, refusal: str) -> None:
        self._name, self._refusal = name, refusal
        self.is_up = threading.Event()

    def hear(self, monitor: zmq.Socket[bytes]) -> str | None:
        event = recv_monitor_message(monitor)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.is_up.set()
        elif event in _FAILED and not self.is_up.is_set():
            return self._refusal
        elif event == zmq.EVENT_DISCONNECTED and self.is_up.is_set():
            return f"the link to {self._name} is gone"
        return None


class _Server:
    """What happens to the connections that others make."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self._addresses: dict[int, str] = {}
        self._has_failed = False

    def hear(self, monitor: zmq.Socket[bytes]) -> str | None:
        message = recv_monitor_message(monitor)
        event, descriptor = message["event"], int(message["value"])
        if event == zmq.EVENT_ACCEPTED:
            self._addresses[descriptor] = _origin(descriptor)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            pass  # told where the key was refused
        elif event in _FAILED:  # the event of its end, which comes next, says whose it was
            self._has_failed = True
        elif event == zmq.EVENT_DISCONNECTED:
            origin = self._addresses.pop(descriptor, "")
            if name := self.names.pop(descriptor, None):
                return f"the link to {name} is gone"
            if self._has_failed:
                self._has_failed = False
                logger.warning("refused a connection%s: it has another key or none", origin)
        return None


def _origin(descriptor: int) -> str:
    """Whose connection a descriptor of libzmq is, in words; libzmq may have closed it by now."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            return f" from {connection.getpeername()[0]}"
    except OSError:
        return " that ended before its address could be read"
