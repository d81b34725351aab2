"""The watch over the ranks, over both channels: four of them in one process, and what cuts them."""

import threading
import time

import pytest
from zmq_ring import free_address, new_key

from torch_q4metal.errors import PipelineError
from torch_q4metal.pipeline.liveness import Liveness, Member
from torch_q4metal.pipeline.liveness_tcp import TcpChannel
from torch_q4metal.pipeline.liveness_zmq import ZmqChannel

TIMEOUT = 1.6
SECRET = "00" * 16


class Cuttable:
    """A channel that can lose the lines from and to some ranks, without a word."""

    def __init__(self, channel):
        self.inner, self.cut = channel, set()
        self.address, self.port = channel.address, channel.port
        self.connect, self.wake, self.drop = channel.connect, channel.wake, channel.drop
        self.close = channel.close

    def say(self, rank, words):
        if rank not in self.cut:
            self.inner.say(rank, words)

    def hear(self, seconds):
        return [event for event in self.inner.hear(seconds) if event[0] not in self.cut]


class Ring:
    """The watches of ``count`` ranks, and the sentences with which each has ended."""

    def __init__(self, kind, count=4, timeout=TIMEOUT):
        key = new_key()
        self.channels, self.watches = [], []
        self.ended = [None] * count
        self.events = [threading.Event() for _ in range(count)]
        for rank in range(count):
            channel = TcpChannel("127.0.0.1")
            if kind == "zmq":
                channel.close()
                channel = ZmqChannel(key, free_address(2) if rank + 1 < count else None)
            self.channels.append(Cuttable(channel))
            self.watches.append(Liveness(self.channels[-1], lambda s, r=rank: self._end(r, s)))
        hosts = [watch.member(rank, f"host{rank}") for rank, watch in enumerate(self.watches)]
        for rank, watch in enumerate(self.watches):
            watch.start(rank, [Member(**host) for host in hosts], SECRET, timeout)

    def _end(self, rank, sentence):
        self.ended[rank] = sentence
        self.events[rank].set()

    def wait(self, ranks, seconds=10.0):
        """Seconds until these have ended."""
        begin = time.monotonic()
        for rank in ranks:
            assert self.events[rank].wait(seconds), (rank, self.ended)
        return time.monotonic() - begin

    def cut(self, *pair):
        for a, b in (pair, reversed(pair)):
            self.channels[a].cut.add(b)

    def vanish(self, rank):
        """As if its process had ended."""
        watch = self.watches[rank]
        watch._over.set()
        watch._thread.join()
        watch._is_closed = True
        self.channels[rank].close()

    def close(self):
        for watch in self.watches:
            watch.close()


@pytest.fixture(params=["tcp", "zmq"])
def ring(request):
    made = Ring(request.param)
    yield made
    made.close()


def test_idle_ranks_live_on_and_leave_unblamed(ring):
    time.sleep(1.5 * TIMEOUT)
    assert ring.ended == [None] * 4
    assert 0 < ring.watches[1].round_trip(2) < 5
    assert 0 < ring.watches[2].round_trip(1) < 5
    for rank in (3, 1, 2):
        ring.watches[rank].close()
    time.sleep(0.3)
    assert ring.ended == [None] * 4


def test_a_cut_between_middle_ranks_ends_all(ring):
    """Rank 0 reaches both all the time, and says which link it was."""
    ring.cut(1, 2)
    assert ring.wait(range(4)) < TIMEOUT + 3
    one, other = "rank 2 on host2 has not answered for", "seen from rank 1 on host1; all ranks end."
    backward = ring.ended[0].startswith("rank 1 on host1 has not answered")
    if backward:
        one, other = "rank 1 on host1 has not answered for", "seen from rank 2 on host2; all ranks"
    assert one in ring.ended[0]
    assert other in ring.ended[0]


@pytest.mark.parametrize("rank", [0, 2, 3])
def test_a_rank_without_a_network_is_named(ring, rank):
    for other in range(4):
        if other != rank:
            ring.cut(rank, other)
    ring.wait(range(4))
    first = 0 if rank else 1
    assert ring.ended[first].startswith(f"rank {rank} on host{rank} has not answered for 1.2 s")


def test_a_rank_that_ends_without_goodbye_is_named_at_once(ring):
    ring.vanish(2)
    assert ring.wait([0, 1, 3]) < TIMEOUT
    assert ring.ended[0].startswith("rank 2 on host2 has ended")


def test_a_broken_link_is_explained_by_what_was_seen(ring):
    """Rank 3 says first that it can't reach rank 2, but rank 1 it was."""
    link = threading.Thread(target=ring.watches[3].link_failed, args=(2, "cannot be reached"))
    link.start()
    time.sleep(0.2)
    ring.vanish(1)
    ring.wait([0, 2, 3])
    assert ring.ended[0].startswith("rank 1 on host1 has ended")
    link.join(10)


@pytest.mark.parametrize("kind", ["tcp", "zmq"])
def test_nobody_there(kind):
    channel = TcpChannel("127.0.0.1") if kind == "tcp" else ZmqChannel(new_key(), None)
    gone = Member(0, "host0", "127.0.0.1", free_address(1).port)
    with pytest.raises(PipelineError, match=r"rank 0 on host0 is not reached .* refuses the conn"):
        channel.connect(1, [gone], set(), SECRET)
    channel.close()


def test_a_stranger_is_no_rank(caplog):
    """Over TCP: who does not know the secret is refused. (Over ZeroMQ it is the key.)"""
    first, stranger = TcpChannel("127.0.0.1"), TcpChannel("127.0.0.1")
    first.connect(0, [], {1}, SECRET)
    member = Member(0, "host0", first.address, first.port)
    thread = threading.Thread(target=lambda: stranger.connect(1, [member], set(), "11" * 16))
    thread.start()
    events = []
    deadline = time.monotonic() + 10
    while "knows no secret" not in caplog.text and time.monotonic() < deadline:
        events += first.hear(0.1)
    thread.join()
    assert not events
    assert "knows no secret" in caplog.text
    for channel in (first, stranger):
        channel.close()
