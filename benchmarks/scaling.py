"""How speed scales: ``python benchmarks/scaling.py``. Five parts, --parts chooses:

    threads   tok/s with 1, 2, 4, 8 and 16 threads, as far as there are CPUs; the tokens must be the
              same with any number
    context   seconds a token after 128, 1024, 4096 and 8192 tokens, and the law fitted to them:
              seconds = bytes of weights / one rate + bytes of keys and values / another rate;
              logits must be those of the modules
    start     seconds from the start of a process to its first token, the file in the page cache
    rows      8 texts decoded together against one, for us and for llama.cpp; ours must draw the
              tokens that each text alone draws
    probe     GB/s of weights that decoding reads and that a plain read of as many bytes reads, some
              tokens and some reads in turn: memory that others use too is fast one minute and slow
              the next

Each part measures in interleaved rounds; medians count. Writes benchmarks/results/<date>-<cpu>-
scaling.md and .json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import machine
import numpy as np
from compare import add_common_options, engine_environment, engine_list, random_prompt
from engines import ENGINES, REFERENCE, EngineKind, Worker, settle
from models import parse_models, write_model
from peers import set_up
from shapes import SHAPES, SMOLLM2, TITLES

PARTS = ("threads", "context", "start", "rows", "probe")
ROWS = 8
ROW_PROMPT = 32
PROBE_ROUNDS = 20
_FIRST_TOKEN = """
import sys, torch
torch.set_num_threads({threads})
from torch_q4metal.generation import generate_step
from torch_q4metal.models import load_model
model = load_model({path!r}, max_kv_size=256)
next(generate_step(list(range(1, 17)), model, max_tokens=1))
print("first token", flush=True)
"""


class Scaling:
    """Runs the parts; each returns Markdown lines and adds its numbers to ``results["parts"]``."""

    def __init__(self, options: argparse.Namespace, results: dict[str, Any]) -> None:
        self.options = options
        self.results = results
        self.problems: list[str] = []

    def run(self) -> list[str]:
        lines: list[str] = []
        for part in self.options.parts:
            print(f"{part} ...", file=sys.stderr, flush=True)
            lines += ["", *getattr(self, f"_{part}")()]
        return lines

    def _start_worker(
        self, kind: EngineKind, model: str, threads: int, context: int, **more: Any
    ) -> Worker:
        cores = self.options.cores or machine.choose_cores(threads)
        worker = Worker(kind, cores, engine_environment(kind, self.options.kernels))
        path = write_model(self.options.folder, model, kind.format)
        worker.ask("load", path=str(path), threads=threads, context=context, **kind.options, **more)
        return worker

    def _threads(self) -> list[str]:
        counts = [n for n in (1, 2, 4, 8, 16) if n <= len(os.sched_getaffinity(0))]
        lines = ["## Threads", "", "| model | threads | prefill 512, tok/s | decode tok/s |"]
        lines.append("|---|---|---|---|")
        for model in self.options.models:
            prompt, tokens = random_prompt(model, 512), self._tokens(model)
            workers = {
                n: self._start_worker(ENGINES["ours"], model, n, 512 + tokens) for n in counts
            }
            runs: dict[int, list[dict[str, Any]]] = {n: [] for n in counts}
            for number in range(self.options.rounds + 1):
                for n, worker in workers.items():
                    settle()
                    answer = worker.ask("run", prompt=prompt, tokens=tokens)
                    if number:  # the first round warms up
                        runs[n].append(answer)
            for n, worker in workers.items():
                worker.stop()
                if runs[n][-1]["ids"] != runs[1][0]["ids"]:
                    self.problems.append(f"{TITLES[model]}: {n} threads draw other tokens than 1")
                prefill = [512 / run["prefill_s"] for run in runs[n]]
                decode = [(tokens - 1) / run["decode_s"] for run in runs[n]]
                self._keep("threads", model=model, threads=n, prefill=prefill, decode=decode)
                lines.append(f"| {TITLES[model]} | {n} | {_median(prefill)} | {_median(decode)} |")
        return lines

    def _context(self) -> list[str]:
        tokens = 16
        lengths = [128, 1024, 4096, 8192 - tokens]
        lines = ["## Context", "", "| model | " + " | ".join(f"after {n}" for n in lengths)]
        lines[-1] += " | law, GB/s: weights, keys and values | largest misfit |"
        lines.append("|---" * (len(lengths) + 3) + "|")
        for model in self.options.models:
            kind = ENGINES["ours"]
            path = write_model(self.options.folder, model, kind.format)
            environment = engine_environment(kind, self.options.kernels)
            with Worker(kind, self.options.cores, environment) as worker:
                answer = worker.ask(
                    "contexts",
                    path=str(path),
                    threads=self.options.threads,
                    precision="fast",
                    lengths=lengths,
                    tokens=tokens,
                    rounds=self.options.rounds,
                )
            if max(answer["errors"]) > 1e-2:
                self.problems.append(f"{TITLES[model]}: logits are off by {max(answer['errors'])}")
            seconds = [statistics.median(rounds) for rounds in answer["seconds"]]
            law = fit_law(lengths, seconds, answer["weight_bytes"], answer["kv_bytes_a_position"])
            self._keep("context", model=model, lengths=lengths, **answer, **law)
            cells = " | ".join(f"{1e3 * value:.2f} ms" for value in seconds)
            lines.append(
                f"| {TITLES[model]} | {cells} | {law['weights_gb_s']:.1f}, {law['kv_gb_s']:.1f}"
                f" | {law['largest_misfit']:.1%} |"
            )
        return lines

    def _start(self) -> list[str]:
        lines = ["## From process start to the first token", ""]
        lines += ["| what | seconds |", "|---|---|"]
        threads = self.options.threads
        commands = {"importing torch alone": [sys.executable, "-c", "import torch; print(1)"]}
        chat = [sys.executable, "-m", "torch_q4metal.chat", "--prompt", "Hi", "--max-tokens", "1"]
        commands["chat, built-in model, one answer"] = [*chat, "--threads", str(threads)]
        for model in self.options.models:
            path = write_model(self.options.folder, model, "mlx")
            program = _FIRST_TOKEN.format(path=str(path), threads=threads)
            commands[f"{TITLES[model]}, Python API, 16 tokens"] = [sys.executable, "-c", program]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(self.options.rounds + 1):
            for name, command in commands.items():
                taken = _seconds_to_first_output(command)
                if number:  # the first round fills the page cache
                    seconds[name].append(taken)
        for name, values in seconds.items():
            self._keep("start", what=name, seconds=values)
            lines.append(f"| {name} | {_median(values)} |")
        return lines

    def _rows(self) -> list[str]:
        lines = [f"## {ROWS} texts together", ""]
        lines += [
            "| model | engine | 1 text, tok/s | 8 texts, tok/s | ratio |",
            "|---|---|---|---|---|",
        ]
        for model in self.options.models:
            prompts = [random_prompt(model, ROW_PROMPT, seed) for seed in range(ROWS)]
            tokens = min(self._tokens(model), 32)
            workers = {}
            for kind in self.options.engines:
                if write_model(self.options.folder, model, kind.format) is not None:
                    workers[kind.name] = self._start_worker(
                        kind, model, self.options.threads, ROW_PROMPT + tokens, rows=True
                    )
            speeds: dict[str, dict[int, list[float]]] = {
                name: {1: [], ROWS: []} for name in workers
            }
            for number in range(self.options.rounds + 1):
                for name, worker in workers.items():
                    for count in (1, ROWS):
                        settle()
                        answer = worker.ask("rows", prompts=prompts[:count], tokens=tokens)
                        if number:
                            speed = count * (tokens - 1) / answer["decode_s"]
                            speeds[name][count].append(speed)
                    if number == 0 and ENGINES[name].is_ours:
                        self._check_rows(model, worker, prompts, tokens, answer["ids"])
            for name, worker in workers.items():
                worker.stop()
                one, eight = speeds[name][1], speeds[name][ROWS]
                ratios = [together / alone for together, alone in zip(eight, one, strict=True)]
                self._keep("rows", model=model, engine=name, one=one, together=eight)
                lines.append(
                    f"| {TITLES[model]} | {ENGINES[name].title} | {_median(one)} | {_median(eight)}"
                    f" | {_median(ratios)} |"
                )
        return lines

    def _probe(self) -> list[str]:
        lines = ["## Beside a plain read of as many bytes", ""]
        lines += ["| model | precision | tok/s | weights, GB/s | read, GB/s | share |"]
        lines += ["|---|---|---|---|---|---|"]
        kind, threads = ENGINES["ours"], self.options.threads
        for model in self.options.models:
            path = str(write_model(self.options.folder, model, kind.format))
            prompt = random_prompt(model, ROW_PROMPT)
            answers = {}
            for precision in ("fast", "int8"):
                cores = self.options.cores or machine.choose_cores(threads)
                environment = engine_environment(kind, self.options.kernels)
                with Worker(kind, cores, environment) as worker:
                    answers[precision] = answer = worker.ask(
                        "share_of_probe",
                        path=path,
                        threads=threads,
                        precision=precision,
                        prompt=prompt,
                        rounds=PROBE_ROUNDS,
                    )
                seconds = statistics.median(answer["seconds"])
                rate = answer["weight_bytes"] / 1e9 / seconds
                read = answer["weight_bytes"] / 1e9 / min(map(statistics.median, answer["reads"]))
                self._keep("probe", model=model, precision=precision, **answer)
                lines.append(
                    f"| {TITLES[model]} | {precision} | {1 / seconds:.1f} | {rate:.1f}"
                    f" | {read:.1f} | {rate / read:.2f} |"
                )
            with Worker(REFERENCE, None) as worker:
                verdict = worker.ask(
                    "judge",
                    path=path,
                    threads=os.cpu_count(),
                    prompt=prompt,
                    answers=[answer["ids"] for answer in answers.values()],
                )
            for precision, gap in zip(answers, verdict["gaps"]):
                bound = ENGINES["ours" if precision == "fast" else "ours-int8"].largest_gap
                if bound is not None and gap > bound:
                    name = f"{TITLES[model]}, {precision}"
                    self.problems.append(f"{name}: a token is {gap:.3f} behind the first choice")
        return lines

    def _check_rows(
        self,
        model: str,
        worker: Worker,
        prompts: list[list[int]],
        tokens: int,
        together: list[list[int]],
    ) -> None:
        for i, prompt in enumerate(prompts):
            alone = worker.ask("run", prompt=prompt, tokens=tokens)["ids"]
            if alone != [step[i] for step in together]:
                self.problems.append(f"{TITLES[model]}: text {i} among 8 draws other tokens")

    def _tokens(self, model: str) -> int:
        return SHAPES[model].decode_tokens if model in SHAPES else 128

    def _keep(self, part: str, **numbers: Any) -> None:
        self.results["parts"].setdefault(part, []).append(numbers)


def fit_law(
    lengths: list[int], seconds: list[float], weight_bytes: int, kv_bytes: int
) -> dict[str, float]:
    """Least squares of seconds = weight_bytes / a + length * kv_bytes / b, each error relative."""
    terms = np.array([[weight_bytes, length * kv_bytes] for length in lengths]) / 1e9
    measured = np.array(seconds)
    inverse_rates = np.linalg.lstsq(terms / measured[:, None], np.ones(len(lengths)), rcond=None)[0]
    misfit = np.abs(terms @ inverse_rates / measured - 1).max()
    weights, keys_values = (1 / inverse_rates).tolist()
    return {"weights_gb_s": weights, "kv_gb_s": keys_values, "largest_misfit": float(misfit)}


def _seconds_to_first_output(command: list[str]) -> float:
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        taken = time.perf_counter() - begin
        process.stdout.read()
    if not first:
        raise RuntimeError(f"{command} printed nothing")
    return taken


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _parts(text: str) -> list[str]:
    for part in text.split(","):
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(PARTS)}")
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=_parts, default=",".join(PARTS), help="which parts (all)")
    parser.add_argument("--models", type=parse_models, default=f"{SMOLLM2},0.5b,7b-6")
    parser.add_argument(
        "--engines", type=engine_list, default="ours,llama-q4_0", help="of the part rows"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (3)")
    add_common_options(parser)
    options = parser.parse_args()
    if "rows" in options.parts:
        for kind in options.engines:
            if kind.environment is not None:
                set_up(kind.environment, options.wheels)
    results: dict[str, Any] = {"machine": machine.describe(), "threads": options.threads}
    results["parts"] = {}
    scaling = Scaling(options, results)
    body = scaling.run()
    head = ["# Scaling", "", machine.one_line(results["machine"]) + ".", ""]
    head.append(
        f"{options.threads} threads unless said otherwise; medians with the smallest and the"
        f" largest; `{results['machine']['command']}`"
    )
    stem = options.results / machine.file_stem("scaling")
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(head + body) + "\n"
    stem.with_name(stem.name + ".md").write_text(text)
    stem.with_name(stem.name + ".json").write_text(json.dumps(results, indent=1) + "\n")
    print(text)
    for problem in scaling.problems:
        print(f"wrong result: {problem}", file=sys.stderr)
    sys.exit(1 if scaling.problems else 0)


if __name__ == "__main__":
    main()
