"""The ring over ZeroMQ: messages, keys, addresses, and what is said when something is wrong."""

import itertools
import logging
import re
import signal
import socket
import sys
import threading
import time

import pytest
import tiny
import torch
import zmq
from ring import threads_ring
from zmq_ring import close, free_address, new_key, zmq_ring

from torch_q4metal.errors import PipelineError
from torch_q4metal.generation import decode_together, generate_step
from torch_q4metal.models import load_model
from torch_q4metal.pipeline import zmq_transport, zmq_watch
from torch_q4metal.pipeline.zmq_address import Address
from torch_q4metal.pipeline.zmq_transport import ZmqTransport


def numbers(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count,), generator=generator, dtype=torch.uint8)


def random_prompt(length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(256, (length,), generator=generator).tolist()


@pytest.fixture
def pair():
    transports = zmq_ring(2)
    yield transports
    close(transports)


@pytest.mark.parametrize("counts", [(3, 1), (1, 2, 1)])
def test_tokens_and_logits_equal_one_process(tmp_path, counts):
    """Prompts of one pass and of several chunks, and four texts at once."""
    path = tiny.write_tiny(
        tmp_path / "m", "qwen2", tied=False, layers=4, config={"max_position_embeddings": 2048}
    ).path
    whole = load_model(path)
    bounds = [0, *itertools.accumulate(counts)]
    ranges = [range(*part) for part in itertools.pairwise(bounds)]
    batch = [random_prompt(n) for n in (20, 3, 550, 9)]

    def run(model):
        seen = [
            [(token, logprobs.clone()) for token, logprobs in steps]
            for n in (6, 1100)
            for steps in [generate_step(random_prompt(n), model, max_tokens=4)]
        ]
        texts = [[] for _ in batch]
        take = lambda index, token, last: texts[index].append(token) or False  # noqa: E731
        decode_together(model, [list(prompt) for prompt in batch], 6, take)
        return seen, texts

    transports = zmq_ring(len(counts))
    with threads_ring(path, ranges, transports) as staged:
        seen, texts = run(staged)
    close(transports)
    expected, expected_texts = run(whole)
    assert texts == expected_texts
    for ours, theirs in zip(seen, expected, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_messages_go_round_in_order(world_size):
    """Many are under way, of all sizes, each into a buffer that is larger."""
    ring = zmq_ring(world_size)
    sizes = [1, 100, 70_000, 3, 2_000_000, *[40] * 20, 5_000_000, 7]
    for sender, receiver in zip(ring, ring[1:] + ring[:1], strict=True):
        messages = [numbers(size, seed) for seed, size in enumerate(sizes)]
        buffers = [torch.zeros(5_000_100, dtype=torch.uint8) for _ in sizes]
        received = [receiver.receive(buffer) for buffer in buffers]
        thread = threading.Thread(target=received[-1].wait)
        thread.start()
        for sent in [sender.send(message) for message in messages]:
            sent.wait()
        thread.join(20)
        for message, buffer, transfer in zip(messages, buffers, received, strict=True):
            transfer.wait()
            transfer.wait()  # once more is allowed
            assert torch.equal(buffer[: len(message)], message)
    close(ring)


def test_a_receiver_that_is_behind_holds_up_the_sender(pair):
    """So memory is bounded, whatever one stage is ahead of the next."""
    messages = [pair[0].send(numbers(4_000_000)) for _ in range(30)]
    time.sleep(0.3)
    assert messages[0].is_done
    assert not messages[-1].is_done
    buffer = torch.zeros(4_000_000, dtype=torch.uint8)
    thread = threading.Thread(target=messages[-1].wait)
    thread.start()
    for _ in messages:
        pair[1].receive(buffer).wait()
    thread.join(20)
    assert messages[-1].is_done


def test_an_interrupted_receive_loses_nothing(pair):
    buffer = torch.zeros(10, dtype=torch.uint8)
    waiting = pair[0].receive(buffer)
    timer = threading.Timer(0.1, lambda: signal.pthread_kill(threading.main_thread().ident, 2))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        waiting.wait()
    pair[1].send(numbers(10)).wait()
    waiting.wait()
    assert torch.equal(buffer, numbers(10))


def test_a_message_that_does_not_fit_is_an_error(pair):
    pair[1].send(numbers(11)).wait()
    with pytest.raises(PipelineError, match="sent 11 bytes, more than"):
        pair[0].receive(torch.zeros(10, dtype=torch.uint8)).wait()


# ---- what goes wrong


def dealer(address, server_key, key):
    """A stranger's socket, with whatever keys."""
    made = zmq.Context().socket(zmq.DEALER)
    made.curve_serverkey, made.curve_publickey, made.curve_secretkey = (
        server_key, key.public, key.secret,
    )  # fmt: skip
    made.linger = 0
    made.connect(f"tcp://{address}")
    return made


@pytest.fixture
def half():
    """(address, key) of a rank 0 that waits for rank 1, and what its joining gives."""
    key, address = new_key(), free_address()
    errors, joined = [], []

    def join():
        try:
            joined.append(ZmqTransport(0, 2, address, key, join_timeout=20))
        except PipelineError as error:
            errors.append(error)

    thread = threading.Thread(target=join)
    thread.start()
    yield address, key
    last = ZmqTransport(1, 2, address, key, join_timeout=20)  # it still can
    thread.join(20)
    assert not errors
    close([*joined, last])


# libzmq closes such a connection at once, and may be done before anybody has asked whose it is.
REFUSED = r"refused a connection (from 127\.0\.0\.1|that ended before its address could be read):"


def wait_for_log(caplog, text):
    deadline = time.monotonic() + 10
    while text not in caplog.text:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.01)


def test_an_unknown_key_is_refused_and_logged(half, caplog):
    """Even of one who knows the public half of the cluster's key."""
    address, key = half
    stranger = new_key()
    with caplog.at_level(logging.WARNING):
        hello = b'{"join": 1, "world_size": 2, "host": "x", "listens": ""}'
        socket = dealer(address, key.public, stranger)
        socket.send(hello)
        text = f"refused a connection from 127.0.0.1: unknown key {stranger.public.decode()}"
        wait_for_log(caplog, text)
        assert not socket.poll(200)
        socket.close()


def test_a_rank_with_another_key_file_is_told(half, caplog):
    address, _ = half
    with caplog.at_level(logging.WARNING):
        with pytest.raises(PipelineError, match="does not take this rank's key; copy the key file"):
            ZmqTransport(1, 2, address, new_key(), join_timeout=20)
        wait_for_log(caplog, ": it has another key or none")
    assert re.search(REFUSED, caplog.text)


def test_a_connection_without_a_key_is_refused(half, caplog):
    address, _ = half
    with caplog.at_level(logging.WARNING):
        socket = zmq.Context().socket(zmq.DEALER)
        socket.connect(f"tcp://{address}")
        socket.send(b'{"join": 1, "world_size": 2, "host": "x", "listens": ""}', zmq.NOBLOCK)
        wait_for_log(caplog, ": it has another key or none")
        socket.close(0)
    assert re.search(REFUSED, caplog.text)


def test_whose_a_connection_is_can_be_told_until_it_has_ended():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as connection:
            descriptor = connection.fileno()
            assert zmq_watch._origin(descriptor) == " from 127.0.0.1"
        assert zmq_watch._origin(descriptor) == " that ended before its address could be read"


def test_ranks_that_do_not_fit_are_told_and_the_others_go_on(half):
    address, key = half
    with pytest.raises(PipelineError, match="--world-size is 2 on rank 0, but 3 on rank 2"):
        ZmqTransport(2, 3, address, key, join_timeout=20)


def test_a_rank_that_is_there_already_is_told():
    key, address = new_key(), free_address()
    ranks = []
    joins = [
        threading.Thread(target=lambda r=rank: ranks.append(ZmqTransport(r, 3, address, key)))
        for rank in (0, 1)
    ]
    for thread in joins:
        thread.start()
    time.sleep(0.5)
    with pytest.raises(PipelineError, match="there is a rank 1 already; give each"):
        ZmqTransport(1, 3, address, key, join_timeout=20)
    ranks.append(ZmqTransport(2, 3, address, key))
    for thread in joins:
        thread.join(20)
    close(sorted(ranks, key=lambda each: each.rank))


def test_a_rank_that_is_gone_is_named():
    """By both neighbours, and by rank 0, which is one of them or not."""
    ring = zmq_ring(4)
    kill(ring[2])
    for rank in (0, 1, 3):
        with pytest.raises(PipelineError, match=r"the link to rank 2( on \S+)? is gone"):
            ring[rank].receive(torch.zeros(1, dtype=torch.uint8)).wait()
    close(ring)


def test_what_was_sent_before_the_end_arrives(pair):
    for size in (3, 500_000, 2):
        pair[1].send(numbers(size)).wait()
    time.sleep(0.2)
    kill(pair[1])
    time.sleep(0.2)
    for size in (3, 500_000, 2):
        buffer = torch.zeros(size, dtype=torch.uint8)
        pair[0].receive(buffer).wait()
        assert torch.equal(buffer, numbers(size))
    with pytest.raises(PipelineError, match="the link to rank 1 on"):
        pair[0].receive(torch.zeros(1, dtype=torch.uint8)).wait()


def kill(transport):
    """As if its process had ended: it waits for nobody."""
    transport._is_joined = False
    transport.close()


def test_nobody_there():
    address = free_address()
    text = rf"rank 1 does not reach rank 0 in time: {address} refuses the connection: nothing liste"
    with pytest.raises(PipelineError, match=text):
        ZmqTransport(1, 2, address, new_key(), join_timeout=0.2)


def test_a_rank_that_waits_says_what_is_in_the_way(monkeypatch, caplog):
    """Once, and goes on waiting."""
    monkeypatch.setattr(zmq_transport, "_LOOK_AFTER", 0.1)
    key, address, joined = new_key(), free_address(), []
    join = threading.Thread(target=lambda: joined.append(ZmqTransport(1, 2, address, key)))
    with caplog.at_level(logging.WARNING):
        join.start()
        wait_for_log(caplog, f"rank 1 still waits for rank 0: {address} refuses the connection")
        time.sleep(0.3)
        first = ZmqTransport(0, 2, address, key)
        join.join(20)
    assert caplog.text.count("still waits") == 1
    close([first, *joined])


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "*"])
def test_nobody_listens_everywhere(bind):
    with pytest.raises(PipelineError, match=r"means every network|no known host"):
        ZmqTransport(0, 2, free_address(), new_key(), bind, join_timeout=1)


def test_interfaces_by_name():
    address, loopback = free_address(), "lo" if sys.platform == "linux" else "lo0"
    with pytest.raises(PipelineError, match="heard nothing from rank 1"):
        ZmqTransport(0, 2, address, new_key(), loopback, join_timeout=0.1)
    with pytest.raises(PipelineError, match=r"'en77' is no known host.*interfaces here: .*lo"):
        ZmqTransport(0, 2, address, new_key(), "en77", join_timeout=0.1)
    with pytest.raises(PipelineError, match=r"cannot listen on 192.0.2.1.*--interface NAME"):
        ZmqTransport(0, 2, address, new_key(), "192.0.2.1", join_timeout=0.1)


def test_a_middle_rank_needs_a_network():
    """Loopback would be of no use to the next rank, and every network is not asked for."""
    with pytest.raises(PipelineError, match="name the network it comes from with --interface"):
        ZmqTransport(1, 3, Address("192.0.2.1", 29400), new_key(), join_timeout=0.1)


@pytest.mark.parametrize("text", ["host", "host:", ":29400", "host:http", "host:0", "host:65536"])
def test_addresses_that_are_none(text):
    with pytest.raises(PipelineError, match="--connect is HOST:PORT"):
        Address.parse(text)


def test_addresses():
    assert Address.parse("mac.local:29400") == Address("mac.local", 29400)
    assert str(Address.parse("[fe80::1]:29400")) == "[fe80::1]:29400"
