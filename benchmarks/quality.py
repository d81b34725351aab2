"""What the precisions cost in quality: ``python benchmarks/quality.py [MODEL]``.

Mean Kullback-Leibler divergence, in nats a token, of the next-token distribution from that of exact
precision, over 2,000 tokens of ordinary English text that the model reads: fast and int8, once as a
prompt (GEMM kernels) and once token by token (matvec kernels), and beside them MLX on the same file
in bfloat16, its default for weights of that type. MODEL is a folder or id; the built-in model
without it. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from torch_q4metal import decode
from torch_q4metal.builtin_model import builtin_model
from torch_q4metal.hub import resolve_model
from torch_q4metal.models import load_model
from torch_q4metal.models.base import CausalLM
from torch_q4metal.tokenizer import Tokenizer

TOKENS = 2000
CHUNK = 250  # positions whose logits are held at a time
TEXTS = ("README.md", "LICENSE", "CONTRIBUTING.md")


def ordinary_text(tokenizer: Tokenizer, count: int = TOKENS) -> list[int]:
    """Token ids [count] of this project's prose."""
    root = Path(__file__).resolve().parent.parent
    ids = tokenizer.encode("\n\n".join((root / name).read_text() for name in TEXTS))
    if len(ids) < count:
        raise SystemExit(f"error: the texts have {len(ids)} tokens, {count} are needed.")
    return ids[:count]


def module_logprobs(model: CausalLM, ids: list[int]) -> Iterator[Tensor]:
    """Log-probabilities [positions, V] after every token, through the modules."""
    cache = model.make_cache(len(ids))
    for first in range(0, len(ids), CHUNK):
        part = torch.tensor([ids[first : first + CHUNK]])
        yield model(part, [cache])[0].log_softmax(-1)


def prompt_logprobs(model: CausalLM, ids: list[int]) -> Iterator[Tensor]:
    """The same as the decode plan reads prompts: its GEMMs."""
    cache, plan = model.make_cache(len(ids)), decode.DecodePlan(model)
    for first in range(0, len(ids), CHUNK):
        part = ids[first : first + CHUNK]
        cache.reserve(len(part))
        rows = torch.empty(len(part), model.config.vocab_size)
        plan.advance(torch.tensor(part), [cache], [len(part)], rows)
        cache.append(part)
        yield rows.log_softmax(-1)


def decode_logprobs(model: CausalLM, ids: list[int]) -> Iterator[Tensor]:
    """The same, token by token: its matvecs."""
    cache = model.make_cache(len(ids))
    for first in range(0, len(ids), CHUNK):
        rows = [decode.forward(model, [[token]], [cache]) for token in ids[first : first + CHUNK]]
        yield torch.cat(rows).log_softmax(-1)


def mlx_logprobs(path: Path, ids: list[int]) -> Iterator[Tensor]:
    """The same from MLX in bfloat16."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model as load_mlx

    model, _ = load_mlx(path)
    model.set_dtype(mx.bfloat16)
    cache = make_prompt_cache(model)
    for first in range(0, len(ids), CHUNK):
        logits = model(mx.array([ids[first : first + CHUNK]]), cache=cache)[0]
        rows = logits.astype(mx.float32)
        mx.eval(rows)
        yield torch.from_dlpack(rows).clone().log_softmax(-1)


def divergence(expected: Iterable[Tensor], actual: Iterable[Tensor]) -> float:
    """Mean over positions of the sum of p (log p - log q), p expected, in float64."""
    total, positions = 0.0, 0
    for p, q in zip(expected, actual, strict=True):
        total += float((p.double().exp() * (p.double() - q.double())).sum())
        positions += len(p)
    return total / positions


@torch.inference_mode()
def measure(path: Path, count: int = TOKENS) -> dict[str, float]:
    """KL divergence in nats a token of each way from exact precision."""
    ids = ordinary_text(Tokenizer.from_dir(path), count)

    def load(precision: str) -> CausalLM:
        return load_model(path, precision=precision, max_kv_size=max(count, 256))

    exact = list(module_logprobs(load("exact"), ids))  # 0.4 GB for 2,000 tokens of SmolLM2
    found: dict[str, float] = {}

    def keep(name: str, logprobs: Iterator[Tensor]) -> None:
        found[name] = divergence(exact, logprobs)
        print(f"{name:14} {found[name]:.3g} nats a token", file=sys.stderr, flush=True)

    for precision in ("fast", "int8"):
        model = load(precision)
        keep(f"{precision} prompt", prompt_logprobs(model, ids))
        keep(f"{precision} decode", decode_logprobs(model, ids))
    keep("MLX bfloat16", mlx_logprobs(path, ids))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    arguments = parser.parse_args()
    path = builtin_model(lambda _: None) if arguments.model is None else None
    found = measure(path or resolve_model(arguments.model), arguments.tokens)
    print(json.dumps({"tokens": arguments.tokens, **found}))


if __name__ == "__main__":
    main()
