"""The thread team under load: many callers, more threads than cores, forks, changing counts."""

import multiprocessing
import os
import signal
import threading

import torch

from torch_q4metal import ops, reference

W = reference.quantize(torch.randn(256, 512), 64, 4)
X = torch.randn(3, 512)


def test_many_callers_get_their_own_results():
    expected = [ops.matmul(X * i, *W) for i in range(8)]
    failures = []

    def call(i):
        for _ in range(50):
            if not torch.equal(ops.matmul(X * i, *W), expected[i]):
                failures.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not failures
    assert not any(caller.is_alive() for caller in callers)


def test_thread_count_may_change_and_exceed_the_cores():
    before = torch.get_num_threads()
    expected = ops.matmul(X, *W)
    try:
        for count in (1, 16, 2, 5, 1, 3):
            torch.set_num_threads(count)
            for _ in range(20):
                assert torch.equal(ops.matmul(X, *W), expected)
    finally:
        torch.set_num_threads(before)


def _child(queue):
    queue.put(ops.matmul(X, *W).tolist())


def test_a_forked_child_has_a_team_of_its_own():
    expected = ops.matmul(X, *W)  # the parent's team is running
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    child.join(60)
    assert child.exitcode == 0, f"child of {os.getpid()} did not end"
    assert queue.get() == expected.tolist()


def test_children_fork_off_while_other_threads_call():
    """Whatever the parent's team is doing: its threads and its lock are not the child's."""
    expected = ops.matmul(X, *W)
    ended = threading.Event()

    def call():
        while not ended.is_set():
            ops.matmul(X, *W)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:  # nothing of pytest may run here
                status = 1
                try:
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends it even inside of a call
                    signal.alarm(30)
                    status = 0 if torch.equal(ops.matmul(X, *W), expected) else 2
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        ended.set()
        for caller in callers:
            caller.join(60)
