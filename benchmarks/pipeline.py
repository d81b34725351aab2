"""One model over several processes of this machine: ``python benchmarks/pipeline.py``.

tok/s with 1, 2 and 4 stages, for one text and for four together; seconds to the first token of a
prompt of several chunks, which follow each other through the stages or are each waited for; and
what a hop takes: the seconds of a token in which no stage is in its layers and none draws, less
those of one process, divided by the hops; what prepares a pass counts. Each stage has one thread
and a CPU of its own, as far as there are so many. All tokens must be those of one process. Where
the model is a Qwen2, mlx-lm's own pipeline decodes beside it, on MLX's CPU backend over its ring,
with MLX's own choice of tokens.

Writes benchmarks/results/<date>-<cpu>-pipeline.md and .json.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
from compare import random_prompt
from models import DEFAULT_FOLDER, parse_models, write_model
from shapes import SMOLLM2, TITLES

HERE = Path(__file__).resolve().parent
TRANSPORTS = ("gloo", "zmq")
TIMES = ("token_s", "batch_s", "overlap_s", "waiting_s")
_TIMEOUT = 1800


class Pipelines:
    """Runs each combination, and keeps what was wrong."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._folder = folder
        self._expected: Any = None
        self._besides_us = 0.0  # of a token of one process, beside its layers and drawing

    def run(self, model: str) -> list[dict[str, Any]]:
        """One row a combination of stages and transport."""
        path = self.options.path or write_model(self.options.folder, model, "mlx")
        config = json.loads((Path(path) / "config.json").read_text())
        prompt = random_prompt(model, self.options.prompt_tokens)
        if self.options.path:
            prompt = [token % config["vocab_size"] for token in prompt]
        rows = []
        for stages in self.options.stages:
            for transport in TRANSPORTS if stages > 1 else ("none",):
                print(f"{stages} stages, {transport} ...", file=sys.stderr, flush=True)
                rows.append(self._ours(path, prompt, stages, transport, config))
        if config["model_type"] == "qwen2" and importlib.util.find_spec("mlx_lm"):
            for stages in (n for n in self.options.stages if n > 1):
                print(f"{stages} stages, mlx-lm ...", file=sys.stderr, flush=True)
                rows.append(self._mlx(path, prompt, stages))
        return rows

    def _ours(
        self, path: Path, prompt: list[int], stages: int, transport: str, config: dict[str, Any]
    ) -> dict[str, Any]:
        key = self._folder / "key"
        if transport == "zmq" and not key.exists():
            from torch_q4metal.pipeline.key_file import write_key

            write_key(key)
        layers = config["num_hidden_layers"]
        counts = [layers // stages + (i >= stages - layers % stages) for i in range(stages)]
        task = self._task(path, prompt, stages) | {
            "transport": transport, "key": str(key), "split": ",".join(map(str, counts)),
        }  # fmt: skip
        answers = self._start("pipeline_rank.py", task, stages)
        first = answers[0]
        if self._expected is None:
            self._expected = first["ids"]
        name = f"{stages} stages over {transport}"
        if first["ids"] != self._expected:
            self.problems.append(f"{name}: tokens differ from those of one process")
        row = {"engine": "torch_q4metal", "stages": stages, "transport": transport}
        besides = besides_us(answers)
        if stages == 1:
            self._besides_us = statistics.median(besides)
        hops = [(us - self._besides_us) / stages for us in besides] if stages > 1 else []
        return row | {name: first[name] for name in ("ids", *TIMES)} | {"hop_us": hops}

    def _mlx(self, path: Path, prompt: list[int], stages: int) -> dict[str, Any]:
        ports = [free_port() for _ in range(stages)]
        hosts = self._folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        task = self._task(path, prompt, stages)
        environment = {"MLX_HOSTFILE": str(hosts)}
        first = self._start("pipeline_mlx.py", task, stages, environment)[0]
        if first["ids"] != self._expected[0][: len(first["ids"])]:
            pairs = enumerate(zip(first["ids"], self._expected[0], strict=True))
            same = next(i for i, pair in pairs if pair[0] != pair[1])
            self.notes.append(f"mlx-lm, {stages} stages: its first {same} tokens are ours.")
        return {"engine": "mlx-lm", "stages": stages, "transport": "ring", "hop_us": []} | first

    def _task(self, path: Path, prompt: list[int], stages: int) -> dict[str, Any]:
        return {
            "path": str(path), "prompt": prompt, "stages": stages, "port": free_port(),
            "tokens": self.options.tokens, "rounds": self.options.rounds, "threads": 1,
        }  # fmt: skip

    def _start(
        self, script: str, task: dict[str, Any], stages: int, environment: Any = None
    ) -> list[dict[str, Any]]:
        """What each rank wrote. Raises RuntimeError, with what one said, if one fails."""
        cores = self.options.cores or sorted(os.sched_getaffinity(0))
        processes = []
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch, contextlib.ExitStack() as s:
            for rank in range(stages):
                out = Path(scratch) / f"{rank}.json"
                own = {"rank": rank, "out": str(out), "cores": [cores[rank % len(cores)]]}
                log = s.enter_context(open(Path(scratch) / f"{rank}.log", "w+"))
                process = subprocess.Popen(
                    [sys.executable, str(HERE / script), json.dumps(task | own)],
                    stdout=log, stderr=log,
                    env=os.environ | {"MLX_RANK": str(rank)} | (environment or {}),
                )  # fmt: skip
                s.callback(process.wait)
                s.callback(process.kill)
                processes.append((process, log, out))
            wait_for([process for process, _, _ in processes])
            for rank, (process, log, _) in enumerate(processes):
                if process.returncode:
                    log.seek(0)
                    tail = "".join(log.readlines()[-15:])
                    raise RuntimeError(f"rank {rank} ended with {process.returncode}:\n{tail}")
            return [json.loads(out.read_text()) for _, _, out in processes]


def besides_us(answers: list[dict[str, Any]]) -> list[float]:
    """Of each round: microseconds of a token beside all stages' layers and the drawing, a median:
    a shared machine takes its milliseconds now and then."""
    found = []
    for steps, (first, end) in zip(answers[0]["steps"], answers[0]["alone"], strict=True):
        passes = zip(*(answer["passes"][first:end] for answer in answers), strict=True)
        beside = [seconds - sum(ranks) for seconds, ranks in zip(steps, passes, strict=True)]
        found.append(1e6 * statistics.median(beside))
    return found


def wait_for(processes: list[subprocess.Popen[bytes]]) -> None:
    """Returns when all have ended, or one has failed."""
    deadline = time.monotonic() + _TIMEOUT
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            time.sleep(2)  # the others have something to say about it
            for process in processes:
                process.kill()
        if time.monotonic() > deadline:
            raise RuntimeError(f"the stages did not end in {_TIMEOUT} s")
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def table(title: str, rows: list[dict[str, Any]], prompt: int) -> list[str]:
    """Markdown."""
    lines = [
        f"## {title}",
        "",
        f"| engine | stages | transport | tok/s | 4 texts, tok/s | us a hop | prefill {prompt},"
        " tok/s | each chunk waited for | overlap gains |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["engine"], str(row["stages"]), row["transport"], rate(row, "token_s", 1)]
        cells += [rate(row, "batch_s", 4), spread(row["hop_us"], 0)]
        cells += [rate(row, "overlap_s", prompt), rate(row, "waiting_s", prompt), gain(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def rate(row: dict[str, Any], key: str, count: int) -> str:
    """Tokens a second."""
    if key not in row:
        return "-"
    return spread([count / seconds for seconds in row[key]], 1)


def spread(values: list[float], digits: int) -> str:
    """Median, smallest and largest."""
    if not values:
        return "-"
    middle, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} ({low} to {high})"


def gain(row: dict[str, Any]) -> str:
    if "overlap_s" not in row:
        return "-"
    ratios = [a / b for a, b in zip(row["waiting_s"], row["overlap_s"], strict=True)]
    return f"{statistics.median(ratios):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=parse_models, default=[SMOLLM2], help="by name (smollm2)")
    parser.add_argument("--path", type=Path, help="a checkpoint's folder instead")
    parser.add_argument("--stages", type=lambda text: [int(n) for n in text.split(",")],
                        default=[1, 2, 4], help="how many (1,2,4)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (5)")
    parser.add_argument("--tokens", type=int, default=64, help="decoded tokens (64)")
    parser.add_argument("--prompt-tokens", type=int, default=2048, help="of prefill (2048)")
    parser.add_argument("--cores", type=lambda text: [int(n) for n in text.split(",")],
                        help="CPUs, one a stage, as 0,1,2,3; left out: the first ones")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the models are")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where results go")
    options = parser.parse_args()
    if options.stages[0] != 1:
        parser.error("--stages begins with 1: the tokens of one process are what is checked")
    described = machine.describe()
    results: dict[str, Any] = {"machine": described, "models": []}
    cpus = len(options.cores or os.sched_getaffinity(0))
    lines = ["# One model over several processes", "", machine.one_line(described) + ".", ""]
    lines += [f"One thread a stage, {cpus} CPUs; medians with the smallest and the largest;"
              f" `{described['command']}`"]  # fmt: skip
    problems: list[str] = []
    for model in options.models:
        title = str(options.path) if options.path else TITLES[model]
        with tempfile.TemporaryDirectory() as folder:
            pipelines = Pipelines(options, Path(folder))
            rows = pipelines.run(model)
        lines += ["", *table(title, rows, options.prompt_tokens)]
        lines += ["", *pipelines.notes] if pipelines.notes else []
        results["models"].append({"title": title, "rows": rows})
        problems += [f"{title}: {problem}" for problem in pipelines.problems]
    stem = options.results / machine.file_stem("pipeline")
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    stem.with_name(stem.name + ".md").write_text(text)
    stem.with_name(stem.name + ".json").write_text(json.dumps(results, indent=1) + "\n")
    print(text)
    for problem in problems:
        print(f"wrong result: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
