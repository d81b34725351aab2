"""A network switch with a delay: carries frames between the interfaces of its namespace.

    python relay.py SECONDS INTERFACE...

Each frame leaves ``SECONDS`` after it came, to the interface behind which its address was seen, or
to all others. Kernels without netem need no more than this. Ends with SIGTERM.
"""

import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress

ALL = 3  # ETH_P_ALL
LARGEST = 1 << 16


def main(delay: float, names: list[str]) -> None:
    ports = []
    for name in names:
        port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL))
        port.bind((name, ALL))
        port.setblocking(False)
        ports.append(port)
    print("ready", flush=True)
    behind: dict[bytes, socket.socket] = {}
    waiting: deque[tuple[float, bytes, socket.socket]] = deque()
    while True:
        left = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select(ports, [], [], left)
        for port in readable:
            for frame in arrived(port):
                behind[frame[6:12]] = port
                waiting.append((time.monotonic() + delay, frame, port))
        while waiting and waiting[0][0] <= time.monotonic():
            _, frame, source = waiting.popleft()
            target = behind.get(frame[:6])
            for port in [target] if target else [p for p in ports if p is not source]:
                with suppress(OSError):  # a full queue drops it, as a switch would
                    port.send(frame)


def arrived(port: socket.socket) -> list[bytes]:
    """What came in from the other end, at most some at a time."""
    frames = []
    for _ in range(64):
        try:
            frame, address = port.recvfrom(LARGEST)
        except BlockingIOError:
            break
        if address[2] != socket.PACKET_OUTGOING:
            frames.append(frame)
    return frames


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
