"""One rank of faulty_ranks.py: a plain process with torchrun's environment, or with a CLUSTER_KEY.

    RANK=1 WORLD_SIZE=3 ... fault_rank.py MODEL TIMEOUT PRECISION WHAT

Rank 0 says "ready" on stdout, reads a line from stdin, and then does WHAT: ``answer`` a prompt,
``endless`` answers, or nothing (``idle``). ``slow`` makes every chunk on the last rank one operator
that takes twice the timeout. It says "done" before it ends in good order.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from torch_q4metal.generation import generate_step
from torch_q4metal.ops import read_probe
from torch_q4metal.pipeline import gloo, launch, stage
from torch_q4metal.pipeline.handshake import Settings
from torch_q4metal.pipeline.key_file import read_key
from torch_q4metal.pipeline.zmq_address import Address
from torch_q4metal.pipeline.zmq_transport import ZmqTransport

MODEL, TIMEOUT, PRECISION, WHAT = sys.argv[1:]
SETTINGS = Settings(precision=PRECISION, split="memory", stage_timeout=float(TIMEOUT))


class SlowStage(stage.Stage):
    """As many reads of memory in one operator as take twice the timeout."""

    def compute(self, work, x, cache, out, ahead=None):
        begin = time.perf_counter()
        once = min(read_probe(1 << 26, 1, 3, False))
        read_probe(1 << 26, 1, int(2 * float(TIMEOUT) / once), False)
        print(f"chunk {time.perf_counter() - begin:.1f}", flush=True)
        return super().compute(work, x, cache, out, ahead)


def take_place_in_cluster(key):
    """As cluster.py does it."""
    rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    first, secret = Address(os.environ["MASTER_ADDR"], port), read_key(Path(key))
    place = launch.Place(rank, size, has_terminal=True)
    launch.take_place(place, lambda: ZmqTransport(rank, size, first, secret, join_timeout=50))


def main():
    torch.set_num_threads(1)
    if key := os.environ.get("CLUSTER_KEY"):
        take_place_in_cluster(key)
    if version := os.environ.get("VERSION"):
        launch.__version__ = version
    if WHAT == "slow":  # gloo's own timeout is for connecting alone
        gloo._CONNECT = timedelta(seconds=float(TIMEOUT))
    transport = launch.join()
    last = transport.rank == transport.world_size - 1
    watch = launch.watch_over(transport)
    if transport.rank > 0:
        if WHAT == "slow" and last:
            from torch_q4metal.pipeline import worker

            worker.Stage = SlowStage
        sys.exit(0 if launch.serve(transport, lambda: Path(MODEL), watch, SETTINGS) else 1)
    model = launch.lead(transport, lambda: Path(MODEL), SETTINGS, watch, transport.close)
    print("ready", flush=True)
    sys.stdin.readline()
    if WHAT == "endless":
        while True:
            list(generate_step([1, 2, 3], model, max_tokens=50))
    if WHAT in ("answer", "slow"):
        list(generate_step([1, 2, 3], model, max_tokens=1))
    model.engine.close()
    print("done", flush=True)


try:
    main()
except launch.Q4MetalError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)
