"""What each rank of test_torchrun.py runs: several cases on one process group, one after another.

    torchrun --nproc-per-node 4 ranks.py cases.json answers.pt

A case takes the first ``world_size`` ranks; the others wait for the next one. Rank 0 writes what it
saw: tokens, log-probabilities, what each stage loaded, and what each rank's process held.
"""

import json
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from torch_q4metal.generation import decode_together, generate_step
from torch_q4metal.pipeline import launch, worker
from torch_q4metal.pipeline.gloo import LENGTHS_AHEAD, GlooTransport, world
from torch_q4metal.pipeline.handshake import Settings


class FirstRanks(GlooTransport):
    """The ring of the first ``size`` ranks of a group that was joined before."""

    def __init__(self, size):
        self._take_place(world(), dist.get_rank(), size, LENGTHS_AHEAD)


class WeighedWorker(worker.Worker):
    """Looks at the memory of its process while the model is still there."""

    def run(self):
        ended_well = super().run()
        HELD.append(resident_bytes(self._model.checkpoint.path))
        return ended_well


HELD = []
worker.Worker = WeighedWorker


def resident_bytes(path):
    """Bytes of the files in ``path`` that this process has mapped, and those in memory."""
    if not Path("/proc/self/smaps").exists():
        return 0, 0
    size = resident = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(path) in line
        elif inside and line.startswith("Size:"):
            size += int(line.split()[1]) * 1024
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    return size, resident


def run(case, transport):
    path = Path(case["path"])
    if transport.rank > 0:
        launch.serve(transport, lambda: path)
        return None, HELD.pop()
    model = launch.lead(transport, lambda: path, Settings(**case["settings"]))
    seen = {"stages": model.engine.stages, "tokens": [], "logprobs": [], "batch": []}
    for prompt in case["prompts"]:
        steps = list(generate_step(list(prompt), model, max_tokens=4))
        seen["tokens"].append([token for token, _ in steps])
        seen["logprobs"].append(torch.stack([logprobs for _, logprobs in steps]))
    seen["batch"] = [[] for _ in case["batch"]]

    def take(index, token, last):
        seen["batch"][index].append(token)
        return False

    decode_together(model, [list(prompt) for prompt in case["batch"]], 6, take)
    held = resident_bytes(path)
    model.engine.close()
    return seen, held


def main():
    cases = json.loads(Path(sys.argv[1]).read_text())
    everybody = launch.join()
    answers = []
    for case in cases:
        seen, own = None, (0, 0)
        torch.set_num_threads((case["threads"] * 4)[everybody.rank])
        if everybody.rank < case["world_size"]:
            seen, own = run(case, FirstRanks(case["world_size"]))
        held = [None] * everybody.world_size
        dist.all_gather_object(held, own)
        answers.append((seen, held))
    if everybody.rank == 0:
        torch.save(answers, sys.argv[2])
    everybody.close()


main()
