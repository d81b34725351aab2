"""A ring of threads in one process: the pipeline's own code, without a network or processes.

with threads_ring(path, [range(2), range(2, 5)]) as model:    # rank 0's
    generate_step(prompt, model, ...)
"""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from torch_q4metal import decode
from torch_q4metal.errors import PipelineError
from torch_q4metal.models import CausalLM, load_model
from torch_q4metal.pipeline.driver import Driver
from torch_q4metal.pipeline.worker import Worker

GONE = object()


class QueueTransport:
    """A ``Transport`` whose links are queues. Messages are copied when they are waited for."""

    def __init__(self, rank: int, links: list[queue.SimpleQueue[Any]]) -> None:
        self.rank, self.world_size = rank, len(links)
        self._out, self._in = links[rank], links[rank - 1]
        self.sent: list[int] = []  # bytes of each message

    def send(self, message: Tensor) -> "QueueTransfer":
        self.sent.append(len(message))
        self._out.put(message.clone())
        return QueueTransfer(None, None)

    def receive(self, buffer: Tensor) -> "QueueTransfer":
        return QueueTransfer(self._in, buffer)

    def close(self) -> None:
        self._out.put(GONE)


class QueueTransfer:
    def __init__(self, link: Any, buffer: Tensor | None) -> None:
        self._link, self._buffer = link, buffer
        self._is_done = buffer is None

    def wait(self) -> None:
        if self._is_done:
            return
        message = self._link.get(timeout=60)
        if message is GONE:
            raise PipelineError("the link is gone.")
        self._buffer[: len(message)] = message
        self._is_done = True


@contextmanager
def threads_ring(
    path: Path, ranges: list[range], transports: list[Any] | None = None, **options: Any
) -> Iterator[CausalLM]:
    """Rank 0's model, with its ``ring``; the other ranks are threads.

    ``transports`` are queues if left out; ``options`` are those of ``load_model``, and ``eager``.
    """
    eager = options.pop("eager", False)
    models = [load_model(path, layers=part, **options) for part in ranges]
    for model in models:
        model.eager = eager
    plans = [decode.plan_of(model) for model in models]
    reads_prompts = all(plan is not None and plan.reads_prompts for plan in plans)
    if transports is None:
        links: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in ranges]
        transports = [QueueTransport(rank, links) for rank in range(len(ranges))]
    workers = [
        Worker(transport, model)
        for transport, model in zip(transports[1:], models[1:], strict=True)
    ]
    threads = [
        threading.Thread(target=_serve, args=(worker, transport), daemon=True)
        for worker, transport in zip(workers, transports[1:], strict=True)
    ]
    for thread in threads:
        thread.start()
    driver = Driver(transports[0], models[0], [{"reads_prompts": reads_prompts}])
    models[0].ring = SimpleNamespace(workers=workers, transports=transports)  # for tests
    try:
        yield models[0]
    finally:
        driver.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def _serve(worker: Worker, transport: QueueTransport) -> None:
    torch.set_num_threads(1)
    try:
        worker.run()
    except Exception:  # as if the process had ended
        transport.close()
