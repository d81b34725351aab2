"""Generation under load: processes and threads beside each other, changing thread counts, forks,
and models that go away. Nothing may hang or crash, and every text is the one of a quiet machine.
"""

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
import tiny
import torch

from torch_q4metal import decode, ops
from torch_q4metal.generation import generate_step
from torch_q4metal.models import load_model

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1], [1] * 40, [6, 2, 8])
TOKENS = 24
LIMIT = 60  # seconds, where a hang would be; each takes less than a second when nothing else runs


@pytest.fixture
def path(tmp_path):
    return tiny.write_tiny(tmp_path / "model", layers=4, tied=False).path


@pytest.fixture
def model(path):
    return load_model(path)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def with_value(token, logprobs):
    """A step's token with all bits of its log-probability: a race would not always change ids."""
    return token, float(logprobs[token])


def text(model, prompt=PROMPTS[0]):
    return [with_value(*step) for step in generate_step(prompt, model, max_tokens=TOKENS)]


class Caller(threading.Thread):
    """A thread that keeps what its function returned or raised."""

    def __init__(self, function):
        super().__init__(daemon=True)
        self._function = function
        self._result = self._error = None
        self.start()

    def run(self):
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error

    def result(self):
        self.join(LIMIT)
        assert not self.is_alive(), "hangs"
        if self._error is not None:
            raise self._error
        return self._result


GENERATE = f"""
import os, sys, torch
from torch_q4metal.generation import generate_step
from torch_q4metal.models import load_model
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
model = load_model(sys.argv[1])
for threads in (2, 8):
    torch.set_num_threads(threads)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(2):
        steps = generate_step({PROMPTS[0]}, model, max_tokens={TOKENS})
        print([(token, float(logprobs[token])) for token, logprobs in steps])
"""


def test_two_processes_at_once_on_two_cores(path, model):
    """With two threads each, then with eight each."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", GENERATE, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    late = threading.Timer(LIMIT, lambda: [process.kill() for process in processes])
    late.start()
    try:
        expected = f"{text(model)}\n"
        for _ in range(2):
            for process in processes:
                assert process.stdout.readline() == "ready\n"
            for process in processes:
                process.stdin.write("go\n")
                process.stdin.flush()
            for process in processes:
                assert [process.stdout.readline() for _ in range(2)] == [expected] * 2
        for process in processes:
            assert process.communicate(timeout=LIMIT)[0] == ""
            assert process.returncode == 0
    finally:
        late.cancel()
        for process in processes:
            process.kill()


def test_thread_count_changes_between_and_during_generations(model):
    expected = text(model)
    for count in (1, 8, 2, 5):
        torch.set_num_threads(count)
        assert text(model) == expected
    tokens = []
    for i, step in enumerate(generate_step(PROMPTS[0], model, max_tokens=TOKENS)):
        tokens.append(with_value(*step))
        torch.set_num_threads((1, 2, 8, 3)[i % 4])
    assert tokens == expected


def test_thread_count_changes_in_another_thread(model):
    expected = text(model)
    ended = threading.Event()

    def change():
        while not ended.is_set():
            for count in (1, 8, 2, 3):
                torch.set_num_threads(count)
                time.sleep(0.001)

    changer = Caller(change)
    try:
        for _ in range(5):
            assert Caller(lambda: text(model)).result() == expected  # a new thread asks anew
    finally:
        ended.set()
    changer.result()


def test_python_threads_share_a_plan(model):
    expected = [text(model, prompt) for prompt in PROMPTS]
    plan = decode.plan_of(model)
    callers = [
        Caller(lambda prompt=prompt: [text(model, prompt) for _ in range(3)]) for prompt in PROMPTS
    ]
    assert [caller.result() for caller in callers] == [[tokens] * 3 for tokens in expected]
    assert decode.plan_of(model) is plan


def test_a_model_outlives_its_file_and_a_handle_does_not_outlive_its_model(path):
    model = load_model(path)
    expected = text(model)
    steps = generate_step(PROMPTS[0], model, max_tokens=TOKENS)
    tokens = [with_value(*next(steps)) for _ in range(5)]
    (path / "model.safetensors").unlink()
    shutil.rmtree(path)
    assert tokens + [with_value(*step) for step in steps] == expected

    # Freed here while another thread generates with it: that thread ends its text.
    handle, gone = decode.plan_of(model).native.handle, weakref.ref(model)
    arguments = step_arguments(model)
    started = threading.Event()

    def generate(model):
        tokens = []
        for step in generate_step(PROMPTS[0], model, max_tokens=TOKENS):
            tokens.append(with_value(*step))
            started.set()
        return tokens

    caller = Caller(lambda model=model: generate(model))
    del model, steps
    assert started.wait(LIMIT)
    gc.collect()
    assert caller.result() == expected
    del caller
    gc.collect()
    assert gone() is None
    with pytest.raises(ValueError, match=f"decode plan {handle} does not exist"):
        ops.decode_step(handle, *arguments)


def step_arguments(model):
    """Arguments of decode_step for one token at the beginning of a text, without the handle."""
    cache = model.make_cache(32)
    cache.reserve(1)
    rope = torch.stack(model.config.rope.rows(0, 1, 1), 1)
    tables = torch.tensor([cache.block_table], dtype=torch.int32)
    out = torch.empty(1, model.config.vocab_size)
    return torch.tensor([5]), torch.tensor([0]), rope, tables, cache.pool.slabs, out


FREE = """
import gc, sys, threading, time
from torch_q4metal import decode, ops
from torch_q4metal.models import load_model
from test_loads import step_arguments

for _ in range(8):
    model = load_model(sys.argv[1])
    arguments, plan = step_arguments(model), decode.DecodePlan(model)
    handle, begun, messages = plan.native.handle, threading.Event(), []

    def call():
        try:
            while True:
                ops.decode_step(handle, *arguments)
                begun.set()
        except ValueError as error:
            messages.append(str(error))

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    begun.wait()
    del model, plan
    gc.collect()
    for caller in callers:
        caller.join()
    assert messages == [f"decode plan {handle} does not exist, or its model was freed"] * 2
"""


def test_a_plan_is_freed_while_others_call_it_by_its_handle(tmp_path):
    """Passes under way end before the weights are unmapped. In a process of its own, as it crashes
    where they do not."""
    large = tiny.write_tiny(tmp_path / "large", layers=24, hidden_size=128, intermediate_size=256)
    result = subprocess.run(
        [sys.executable, "-c", FREE, str(large.path)], timeout=2 * LIMIT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
    )  # fmt: skip
    assert result.returncode == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_a_child_forks_off_while_another_thread_generates(model, threads):
    """It decodes with the plan only: torch's own OpenMP does not survive a fork (libgomp hangs)."""
    torch.set_num_threads(threads)
    expected = text(model, PROMPTS[1])
    ended = threading.Event()

    def generate():
        torch.set_num_threads(threads)
        while not ended.is_set():
            assert text(model, PROMPTS[1]) == expected

    caller = Caller(generate)
    try:
        for _ in range(8):
            child = os.fork()
            if child == 0:  # nothing of pytest may run here
                status = 1
                try:
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends it even inside of a pass
                    signal.alarm(LIMIT)
                    status = 0 if text(model, PROMPTS[1]) == expected else 2
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        ended.set()
    caller.result()
