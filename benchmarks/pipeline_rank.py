"""One rank of pipeline.py: ``python pipeline_rank.py JSON``. Pins itself; writes what it measured.

Every rank times its own layers, and the last one how it draws, so that what a token takes besides
can be laid to the hops.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TASK: dict[str, Any] = json.loads(sys.argv[1])
if TASK["cores"]:  # before torch makes threads: they inherit it
    os.sched_setaffinity(0, TASK["cores"])

import torch  # noqa: E402

from torch_q4metal.decode_plan import DecodePlan  # noqa: E402
from torch_q4metal.generation import decode_together, generate_step  # noqa: E402
from torch_q4metal.models.base import PREFILL_CHUNK, CausalLM  # noqa: E402
from torch_q4metal.pipeline import launch  # noqa: E402
from torch_q4metal.pipeline.handshake import Settings  # noqa: E402
from torch_q4metal.pipeline.transport import Transport  # noqa: E402
from torch_q4metal.text import Choice  # noqa: E402


class TimedCompute:
    """Wraps what computes. ``passes``: seconds of each pass of one token, drawing included.

    What prepares a pass, and its result for the next stage, is no computing.
    """

    def __init__(self) -> None:
        self.passes: list[float] = []
        self._is_alone = False  # the last pass was of one token
        run, draw = DecodePlan.run, Choice.draw

        def timed_run(plan: DecodePlan, x: Any, *rest: Any) -> None:
            begin = time.perf_counter()
            run(plan, x, *rest)
            self._is_alone = len(x) == 1
            if self._is_alone:
                self.passes.append(time.perf_counter() - begin)

        def timed_draw(choice: Choice, *arguments: Any) -> Any:
            begin = time.perf_counter()
            result = draw(choice, *arguments)
            if self._is_alone:
                self.passes[-1] += time.perf_counter() - begin
            return result

        DecodePlan.run = timed_run  # type: ignore[method-assign]
        Choice.draw = timed_draw  # type: ignore[method-assign]


def join() -> Transport:
    rank, size = TASK["rank"], TASK["stages"]
    if TASK["transport"] == "gloo":
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(TASK["port"]), "LOCAL_WORLD_SIZE": str(size),
        }  # fmt: skip
        return launch.join()
    from torch_q4metal.pipeline.key_file import read_key
    from torch_q4metal.pipeline.zmq_address import Address
    from torch_q4metal.pipeline.zmq_transport import ZmqTransport

    first, key = Address("127.0.0.1", TASK["port"]), read_key(Path(TASK["key"]))
    launch.take_place(launch.Place(rank, size), lambda: ZmqTransport(rank, size, first, key))
    return launch.join()


@contextmanager
def loaded() -> Iterator[CausalLM]:
    """The model of one process, or rank 0's."""
    path, context = Path(TASK["path"]), len(TASK["prompt"]) + TASK["tokens"]
    settings = Settings(max_kv_size=context, split=TASK["split"])
    if TASK["stages"] == 1:
        yield launch.load(path, settings)
        return
    transport = join()
    watch = launch.watch_over(transport)
    model = launch.lead(transport, lambda: path, settings, watch, transport.close)
    yield model
    assert model.engine is not None
    model.engine.close()


def decode_timed(model: CausalLM, prompts: list[list[int]]) -> tuple[list[list[int]], list[float]]:
    """(tokens of each text, when all had each of theirs)."""
    found: list[list[int]] = [[] for _ in prompts]
    times: list[float] = []

    def take(index: int, token: int, last: bool) -> bool:
        found[index].append(token)
        times.append(time.perf_counter())
        return False

    decode_together(model, [list(prompt) for prompt in prompts], TASK["tokens"], take)
    return found, times[len(prompts) - 1 :: len(prompts)]


def mean_step(times: list[float]) -> float:
    """Seconds for a token after the first one."""
    return (times[-1] - times[0]) / (len(times) - 1)


def prefill(model: CausalLM, overlapped: bool) -> tuple[int, float]:
    """(first token, seconds to it). Not overlapped: each chunk is waited for before the next."""
    prompt: list[int] = TASK["prompt"]
    cache = model.make_cache()
    begin = time.perf_counter()
    ends = [] if overlapped else list(range(PREFILL_CHUNK, len(prompt), PREFILL_CHUNK))
    token = -1
    for end in [*ends, len(prompt)]:
        steps = generate_step(prompt[:end], model, max_tokens=1, cache=cache, logprobs=False)
        token = next(steps)[0]
        steps.close()
    return token, time.perf_counter() - begin


def measure(model: CausalLM, timed: TimedCompute) -> dict[str, Any]:
    short: list[int] = TASK["prompt"][:16]
    batch = [TASK["prompt"][i : i + 16] for i in range(4)]
    result: dict[str, Any] = {name: [] for name in ("token_s", "batch_s", "overlap_s", "waiting_s")}
    # Of one text alone, what hops are reckoned from: [the first of its passes, the one after its
    # last], which have these numbers on all ranks, and the seconds of each token after the first.
    result |= {"alone": [], "steps": []}
    for number in range(TASK["rounds"] + 1):  # the first one warms up
        begin = len(timed.passes)
        ids, ends = decode_timed(model, [short])
        alone = [begin, len(timed.passes)]
        together, ends_together = decode_timed(model, batch)
        first, overlap_s = prefill(model, overlapped=True)
        same, waiting_s = prefill(model, overlapped=False)
        result["ids"] = [ids[0], together, first, same]
        if number:
            times = (mean_step(ends), mean_step(ends_together), overlap_s, waiting_s)
            for name, seconds in zip(list(result), times, strict=False):
                result[name].append(seconds)
            result["alone"].append(alone)
            result["steps"].append([end - begin for begin, end in itertools.pairwise(ends)])
    return result


def main() -> None:
    torch.set_num_threads(TASK["threads"])
    timed = TimedCompute()
    result: dict[str, Any] = {}
    if TASK["rank"] == 0:
        with loaded() as model:
            result = measure(model, timed)
    else:
        transport = join()
        launch.serve(transport, lambda: Path(TASK["path"]), launch.watch_over(transport))
        transport.close()
    result["passes"] = timed.passes
    Path(TASK["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
