"""Compares torch_q4metal with other engines: ``python benchmarks/compare.py``.

Every engine is a process with the model loaded. In each round all of them run, one after the other,
a prompt of 512 tokens and then decode greedily, so that all meet the same noise; the order moves on
by one from round to round. Reported are medians over the rounds, and as ratios the medians of the
rounds' own ratios, which noise that lasts for a round cannot move.

The results that are timed are checked. Generated models have the same weights for every engine, so
each token that any engine chose in a timed run must be, by the logits of our modules in float32,
the first choice or close behind it: distances are in standard deviations of the logits, and a
wrong kernel is 4 of them away. With SmolLM2 every engine must also answer "Paris".

Writes benchmarks/results/<date>-<cpu>-compare.md, .json and .svg. Models and the environments of
other engines are made when they are missing (see models.py and peers.py --help).
"""

import argparse
import os
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
from engines import ENGINES, REFERENCE, EngineKind, Worker, settle
from models import DEFAULT_FOLDER, parse_models, write_model
from peers import set_up
from report import write_report
from shapes import SHAPES, SMOLLM2, TITLES

DEFAULT_ENGINES = "ours,ours-int8,llama-q4_0,llama-q4_1,openvino,openvino-f32"
KNOWN_PROMPT, KNOWN_ANSWER = "The capital of France is", " Paris"
SMOLLM2_VOCAB = 49152
WARM_UP_TOKENS = 4


@dataclass
class Runs:
    """What one engine did: a number a round, the distinct answers, facts of the worker."""

    kind: EngineKind
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, answer: dict[str, Any], prompt_tokens: int) -> None:
        self.prefill.append(prompt_tokens / answer["prefill_s"])
        self.decode.append((len(answer["ids"]) - 1) / answer["decode_s"])
        if answer["ids"] not in self.answers:
            self.answers.append(answer["ids"])
        if not answer["finite"]:
            self.problems.append("logits are not finite")


class Comparison:
    """All engines on one model."""

    def __init__(self, model: str, kinds: list[EngineKind], options: argparse.Namespace) -> None:
        self.model = model
        self.options = options
        self.tokens = options.decode_tokens or _decode_tokens(model)
        self.paths: dict[str, Path] = {}
        for kind in kinds:
            path = write_model(options.folder, model, kind.format)
            if path is None:
                print(f"{TITLES[model]} does not come as {kind.format}: no {kind.title}")
            else:
                self.paths[kind.name] = path
        self.runs = {kind.name: Runs(kind) for kind in kinds if kind.name in self.paths}
        self.probe: list[float] = []
        self.prompt = random_prompt(model, options.prompt_tokens)
        self._workers: dict[str, Worker] = {}
        self.restart = options.restart or self._need() > machine.available_bytes()

    def run(self) -> dict[str, Any]:
        """Measures and checks. Returns a JSON object for the results."""
        try:
            self._rounds()
            if self.model == SMOLLM2:
                for name in self.runs:
                    self._check_known(name)
        finally:
            for name in list(self._workers):
                self._stop(name)
        self._judge()
        return self._result()

    def _rounds(self) -> None:
        names = list(self.runs)
        for number in range(self.options.rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                worker = self._worker(name)
                settle()
                answer = worker.ask("run", prompt=self.prompt, tokens=self.tokens)
                self.runs[name].add(answer, len(self.prompt))
                self.runs[name].facts["memory"] = worker.ask("memory")
                if self.restart:
                    self._stop(name)
            self.probe.append(self._read_probe())
            latest = ", ".join(
                f"{name} {runs.prefill[-1]:.1f}/{runs.decode[-1]:.1f}"
                for name, runs in self.runs.items()
            )
            print(f"{TITLES[self.model]} round {number + 1}: {latest}", flush=True)

    def _read_probe(self) -> float:
        settle()
        with Worker(REFERENCE, self.options.cores) as worker:
            return float(worker.ask("probe", threads=self.options.threads)["gb_s"])

    def _worker(self, name: str) -> Worker:
        """The engine's process, loaded and warm."""
        if name not in self._workers:
            kind = self.runs[name].kind
            worker = Worker(
                kind, self.options.cores, engine_environment(kind, self.options.kernels)
            )
            self._workers[name] = worker
            facts = worker.ask(
                "load",
                path=str(self.paths[name]),
                threads=self.options.threads,
                context=len(self.prompt) + self.tokens,
                **kind.options,
            )
            self.runs[name].facts.update(facts)
            worker.ask("run", prompt=self.prompt, tokens=WARM_UP_TOKENS)
        return self._workers[name]

    def _stop(self, name: str) -> None:
        self._workers.pop(name).stop()

    def _need(self) -> int:
        """Bytes that all engines together may take: most keep a second copy of the weights."""
        return sum(2 * _size(path) + (1 << 29) for path in self.paths.values())

    def _check_known(self, name: str) -> None:
        prompt, expected = _known_tokens(self.paths.get("ours") or _built_in())
        answer = self._worker(name).ask("run", prompt=prompt, tokens=2)
        if answer["ids"][0] != expected:
            self.runs[name].problems.append(
                f"{KNOWN_PROMPT!r} goes on with token {answer['ids'][0]} instead of {expected}"
            )
        if self.restart:
            self._stop(name)

    def _judge(self) -> None:
        """Puts every answer before the exact modules, all in one process."""
        asked = [(runs, answer) for runs in self.runs.values() for answer in runs.answers]
        path = write_model(self.options.folder, self.model, "mlx")
        with Worker(REFERENCE, None) as worker:
            verdict = worker.ask(
                "judge",
                path=str(path),
                threads=os.cpu_count(),
                prompt=self.prompt,
                answers=[answer for _, answer in asked],
            )
        for (runs, answer), gap, same in zip(asked, verdict["gaps"], verdict["same"]):
            worst = runs.facts.setdefault("largest_gap", 0.0)
            runs.facts["largest_gap"] = max(worst, gap)
            runs.facts["first_choices"] = f"{same}/{len(answer)}"
            # SmolLM2's weights are quantized anew for OpenVINO: another model, strictly speaking.
            bound = None if self._weights_differ(runs.kind) else runs.kind.largest_gap
            if bound is not None and gap > bound:
                runs.problems.append(f"a token is {gap:.3f} behind the first choice, over {bound}")

    def _weights_differ(self, kind: EngineKind) -> bool:
        return self.model == SMOLLM2 and kind.format == "openvino"

    def _result(self) -> dict[str, Any]:
        bytes_of_file = {name: _size(path) for name, path in self.paths.items()}
        return {
            "model": self.model,
            "title": TITLES[self.model],
            "prompt_tokens": len(self.prompt),
            "decode_tokens": self.tokens,
            "restarted_each_turn": self.restart,
            "probe_gb_s": self.probe,
            "engines": [
                {
                    "name": name,
                    "title": runs.kind.title,
                    "is_ours": runs.kind.is_ours,
                    "prefill_tok_s": runs.prefill,
                    "decode_tok_s": runs.decode,
                    "bytes_a_token": self._bytes_a_token(runs, bytes_of_file[name]),
                    "distinct_answers": len(runs.answers),
                    "problems": sorted(set(runs.problems)),
                    **runs.facts,
                }
                for name, runs in self.runs.items()
            ],
        }

    def _bytes_a_token(self, runs: Runs, file_bytes: int) -> int:
        """Bytes of weights that one token reads: an untied embedding counts with one row."""
        if runs.kind.is_ours:
            return int(runs.facts["weight_bytes"])
        total = int(runs.facts.get("weight_bytes", file_bytes))
        shape = SHAPES.get(self.model)
        if shape is None or shape.tied:
            return total
        bits = {"q4_0": 4.5, "q4_1": 5.0, "openvino": 4.3125}[runs.kind.format]
        return total - int((shape.vocabulary - 1) * shape.hidden * bits / 8)


def engine_environment(kind: EngineKind, kernels: str | None) -> dict[str, str]:
    """Environment variables of an engine's process; ``kernels`` is a value of Q4METAL_CPU."""
    return {"Q4METAL_CPU": kernels} if kernels and kind.is_ours else {}


def _decode_tokens(model: str) -> int:
    return SHAPES[model].decode_tokens if model in SHAPES else 128


def random_prompt(model: str, count: int, seed: int = 0) -> list[int]:
    """Token ids of the model's vocabulary, the same every time."""
    vocab = SHAPES[model].vocabulary if model in SHAPES else SMOLLM2_VOCAB
    generator = random.Random(seed)
    return [generator.randrange(vocab) for _ in range(count)]


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _built_in() -> Path:
    from torch_q4metal.builtin_model import builtin_model

    return builtin_model()


def _known_tokens(folder: Path) -> tuple[list[int], int]:
    from torch_q4metal.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_dir(folder)
    prompt = tokenizer.encode(KNOWN_PROMPT)
    whole = tokenizer.encode(KNOWN_PROMPT + KNOWN_ANSWER)
    return prompt, whole[len(prompt)]


def engine_list(text: str) -> list[EngineKind]:
    """Engines out of a list with commas. Raises ArgumentTypeError for one that is not known."""
    for name in text.split(","):
        if name not in ENGINES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(ENGINES)}")
    return [ENGINES[name] for name in text.split(",")]


def _cores(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options that the other benchmarks of models share."""
    parser.add_argument("--threads", type=int, default=2, help="threads of every engine (2)")
    parser.add_argument(
        "--cores",
        type=_cores,
        help="CPUs to pin all to, as 0,1; left out: one of each of the first cores",
    )
    parser.add_argument("--kernels", help="Q4METAL_CPU of our engines, such as avx2")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the models are")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path(__file__).resolve().parent / "results",
        help="where results go (benchmarks/results)",
    )
    parser.add_argument("--wheels", type=Path, help="set peers up from this folder (peers.py)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        type=parse_models,
        default="smollm2,0.5b,1.5b,7b-6",
        help="of smollm2, 0.5b, 1.5b, 7b-6, 7b (all but the last)",
    )
    parser.add_argument(
        "--engines",
        type=engine_list,
        default=DEFAULT_ENGINES,
        help=f"of {', '.join(ENGINES)} ({DEFAULT_ENGINES})",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="tokens of the prompt (512)")
    parser.add_argument(
        "--decode-tokens", type=int, help="tokens to decode; fewer the larger the model (128 to 16)"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="load each engine anew for its turn; happens by itself where memory is too small",
    )
    parser.add_argument("--name", default="compare", help="last part of the results' names")
    add_common_options(parser)
    options = parser.parse_args()
    if options.cores is None:
        options.cores = machine.choose_cores(options.threads)
    for kind in options.engines:
        if kind.environment is not None:
            set_up(kind.environment, options.wheels)
    results = {"machine": machine.describe(), "threads": options.threads, "cores": options.cores}
    results["models"] = [
        Comparison(model, options.engines, options).run() for model in options.models
    ]
    stem = options.results / machine.file_stem(options.name)
    print(write_report(results, stem))
    problems = [
        f"{model['title']}, {engine['title']}: {problem}"
        for model in results["models"]
        for engine in model["engines"]
        for problem in engine["problems"]
    ]
    for problem in problems:
        print(f"wrong result: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
