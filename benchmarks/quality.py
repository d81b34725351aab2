"""What the precisions cost in quality: ``python benchmarks/quality.py [MODEL]``.

Mean Kullback-Leibler divergence, in nats a token, of the next-token distribution from that of exact
precision, over 2,000 tokens of ordinary English text in windows of 250, each read from its
beginning; and how often both find the same token the most likely. Of fast and int8, once as a
prompt (GEMM kernels) and once token by token (matvec kernels); beside them MLX on the same file:
in bfloat16, its default for weights of that type, and two parts of what that costs. MLX adds up
products in bfloat16 on x86, in float32 on Apple's processors and GPUs. MODEL is a folder or id; the
built-in model without it.

MLX's bfloat16 takes a second a token on a CPU. What is finished is kept window by window in
benchmarks/results/quality-unfinished.jsonl, and a run of the same command takes it up.

Writes benchmarks/results/<date>-<cpu>-quality.md and .json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor

from torch_q4metal import decode, ops
from torch_q4metal.builtin_model import builtin_model
from torch_q4metal.hub import resolve_model
from torch_q4metal.models import load_model
from torch_q4metal.models.base import CausalLM
from torch_q4metal.tokenizer import Tokenizer

TEXTS = ("README.md", "LICENSE", "CONTRIBUTING.md")
PIECE = 10  # tokens that MLX reads at a time: Ctrl-C waits for one piece
RESULTS = machine.ROOT / "benchmarks" / "results"

# Log-probabilities [positions, V] after every token of a text.
Reader = Callable[[list[int]], Tensor]


def ordinary_text(tokenizer: Tokenizer, count: int) -> list[int]:
    """Token ids [count] of this project's prose."""
    ids = tokenizer.encode("\n\n".join((machine.ROOT / name).read_text() for name in TEXTS))
    if len(ids) < count:
        raise SystemExit(f"error: the texts have {len(ids)} tokens, {count} are needed.")
    return ids[:count]


def modules(model: CausalLM) -> Reader:
    """Through the modules."""

    def read(ids: list[int]) -> Tensor:
        return model(torch.tensor([ids]), [model.make_cache(len(ids))])[0].log_softmax(-1)

    return read


def prompt(model: CausalLM) -> Reader:
    """As the decode plan reads prompts: its GEMMs."""
    plan = decode.DecodePlan(model)

    def read(ids: list[int]) -> Tensor:
        cache = model.make_cache(len(ids))
        cache.reserve(len(ids))
        rows = torch.empty(len(ids), model.config.vocab_size)
        plan.advance(torch.tensor(ids), [cache], [len(ids)], rows)
        return rows.log_softmax(-1)

    return read


def token_by_token(model: CausalLM) -> Reader:
    """The decode plan's matvecs."""

    def read(ids: list[int]) -> Tensor:
        cache = model.make_cache(len(ids))
        rows = [decode.forward(model, [[token]], [cache]) for token in ids]
        return torch.cat(rows).log_softmax(-1)

    return read


def mlx(path: Path, *, activations: str = "bfloat16", dequantize: bool = False) -> Reader:
    """MLX with scales in bfloat16. With ``dequantize`` the matrices are bfloat16 ones of the same
    values, rounded, whose products MLX adds up in float32 on every processor.
    """
    import mlx.core as mx
    from mlx_lm import utils
    from mlx_lm.models.cache import make_prompt_cache

    model, _ = utils.load_model(path)
    model.set_dtype(mx.bfloat16)
    if dequantize:
        model = utils.dequantize_model(model)
    model.set_dtype(getattr(mx, activations))

    def read(ids: list[int]) -> Tensor:
        cache, parts = make_prompt_cache(model), []
        for first in range(0, len(ids), PIECE):
            logits = model(mx.array([ids[first : first + PIECE]]), cache=cache)[0]
            rows = logits.astype(mx.float32)
            mx.eval(rows)
            parts.append(torch.from_dlpack(rows).clone())
        return torch.cat(parts).log_softmax(-1)

    return read


def readers(path: Path, window: int, with_mlx: bool) -> dict[str, Reader]:
    """By name; the exact one first."""

    def load(precision: str) -> CausalLM:
        return load_model(path, precision=precision, max_kv_size=max(window, 256))

    found = {"exact": modules(load("exact"))}
    for precision in ("fast", "int8"):
        model = load(precision)
        found[f"{precision}, a prompt"] = prompt(model)
        found[f"{precision}, token by token"] = token_by_token(model)
    if with_mlx:
        found["MLX float32, bfloat16 scales"] = mlx(path, activations="float32")
        found["MLX bfloat16, float32 sums"] = mlx(path, dequantize=True)
        found["MLX bfloat16"] = mlx(path)
    return found


def compare(expected: Tensor, actual: Tensor) -> dict[str, float]:
    """Means over positions: the sum of p (log p - log q), p expected, and equal most likely tokens.

    In float64; both are log-probabilities [positions, V].
    """
    p, q = expected.double(), actual.double()
    return {
        "nats": (p.exp() * (p - q)).sum(-1).mean().item(),
        "same": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    }


class Unfinished:
    """A file of what is measured: one JSON line for each window and reader, after a line of what
    they belong to. Lines that belong to something else are dropped.
    """

    def __init__(self, path: Path, of: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[tuple[int, str], dict[str, float]] = {}
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if not whole or json.loads(whole[0]) != of:
            whole = [json.dumps(of) + "\n"]
        path.write_text("".join(whole))
        for line in whole[1:]:
            entry = json.loads(line)
            self.found[entry.pop("window"), entry.pop("reader")] = entry

    def add(self, window: int, reader: str, entry: dict[str, float]) -> None:
        self.found[window, reader] = entry
        with self.path.open("a") as file:
            file.write(json.dumps({"window": window, "reader": reader, **entry}) + "\n")


@torch.inference_mode()
def measure(
    path: Path, ids: list[int], window: int, with_mlx: bool, unfinished: Unfinished
) -> dict[str, list[dict[str, float]]]:
    """By name of the reader, for each window what ``compare`` found."""
    by_name = readers(path, window, with_mlx)
    exact = by_name.pop("exact")
    windows = [ids[first : first + window] for first in range(0, len(ids), window)]
    for number, part in enumerate(windows):
        left = [name for name in by_name if (number, name) not in unfinished.found]
        expected = exact(part) if left else None
        for name in left:
            begin = time.monotonic()
            entry = compare(expected, by_name[name](part))
            unfinished.add(number, name, entry)
            print(
                f"window {number + 1} of {len(windows)}: {name:28} {entry['nats']:.3g} nats a"
                f" token ({time.monotonic() - begin:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
    return {
        name: [unfinished.found[number, name] for number in range(len(windows))] for name in by_name
    }


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "# Distance from exact precision",
        "",
        machine.one_line(results["machine"]) + ".",
        "",
        f"{results['model']}, {results['tokens']} tokens in windows of {results['window']}, kernels"
        f" {results['kernels']}; `{results['machine']['command']}`",
        "",
        "Kullback-Leibler divergence of the next-token distribution from exact precision's, in nats"
        " a token: the mean over all tokens, and the means of the windows. Last column: tokens"
        " where both find the same next token the most likely.",
        "",
        "| | mean | least and largest window | same token |",
        "|---|---|---|---|",
    ]
    for name, windows in results["found"].items():
        nats = [entry["nats"] for entry in windows]
        same = [entry["same"] for entry in windows]
        lines.append(
            f"| {name} | {sum(nats) / len(nats):.2g} | {min(nats):.2g} to {max(nats):.2g}"
            f" | {100 * sum(same) / len(same):.2f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder or id (the built-in model)")
    parser.add_argument("--tokens", type=int, default=2000, help="whole windows of them (2000)")
    parser.add_argument("--window", type=int, default=250, help="tokens read in one go (250)")
    parser.add_argument("--no-mlx", action="store_true", help="leave out MLX, the slow one")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.window < 1 or options.tokens < 1 or options.tokens % options.window:
        parser.error(f"--tokens {options.tokens} is not a number of windows of {options.window}.")
    path = builtin_model(print) if options.model is None else resolve_model(options.model)
    ids = ordinary_text(Tokenizer.from_dir(path), options.tokens)
    settings = {"model": path.name, "tokens": options.tokens, "window": options.window}
    settings["text"] = hashlib.sha256(str(ids).encode()).hexdigest()
    settings["kernels"] = ops.cpu_kernels()
    options.results.mkdir(parents=True, exist_ok=True)
    unfinished = Unfinished(options.results / "quality-unfinished.jsonl", settings)
    found = measure(path, ids, options.window, not options.no_mlx, unfinished)
    results = {"machine": machine.describe(), **settings, "found": found}
    stem = options.results / machine.file_stem("quality")
    stem.with_name(stem.name + ".json").write_text(json.dumps(results, indent=1) + "\n")
    text = markdown(results)
    stem.with_name(stem.name + ".md").write_text(text)
    unfinished.path.unlink()
    print(text)


if __name__ == "__main__":
    main()
