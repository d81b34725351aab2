"""torch_q4metal through its public API, the read probe, and the reference of every check."""

import os
import time
from collections.abc import Iterator
from typing import Any

# As the package's own apps do: torch's idle OpenMP workers would spin on the kernels' cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from worker import Engine, RowsStep, Step, memory, serve

import torch_q4metal
from torch_q4metal import decode, ops
from torch_q4metal.bench import read_probe_gb_s, weight_bytes_per_token
from torch_q4metal.cache import Sequence
from torch_q4metal.generation import generate_step
from torch_q4metal.memory import kv_bytes_per_token
from torch_q4metal.models import load_model

_IMPORTED = memory()["VmRSS"]


class Ours(Engine):
    version = torch_q4metal.__version__

    def __init__(
        self,
        path: str,
        threads: int,
        context: int,
        precision: str = "fast",
        eager: bool = False,
        rows: bool = False,
    ) -> None:
        torch.set_num_threads(threads)
        self.model = load_model(path, precision=precision, max_kv_size=context)
        self.model.eager = eager
        self.context = context

    def details(self) -> dict[str, Any]:
        assert self.model.checkpoint is not None
        return {
            "kernels": ops.cpu_kernels(),
            "torch": torch.__version__,
            "import_rss": _IMPORTED,
            "file_bytes": self.model.checkpoint.weight_bytes,
            "weight_bytes": weight_bytes_per_token(self.model),
            "kv_bytes": kv_bytes_per_token(self.model.config, self.model.kv_dtype) * self.context,
        }

    def generate(self, prompt: list[int], tokens: int) -> Iterator[Step]:
        return generate_step(prompt, self.model, max_tokens=tokens, logprobs=False)

    @torch.inference_mode()
    def generate_rows(self, prompts: list[list[int]], tokens: int) -> Iterator[RowsStep]:
        longest = max(map(len, prompts)) + tokens
        pool = self.model.make_pool(len(prompts) * (longest + 32))
        texts = [Sequence(pool) for _ in prompts]
        rows = [decode.forward(self.model, [p], [t])[0] for p, t in zip(prompts, texts)]
        logits = torch.stack(rows)
        for step in range(tokens):
            drawn = logits.argmax(-1).tolist()
            yield drawn, logits
            if step < tokens - 1:
                logits = decode.forward(self.model, [[token] for token in drawn], texts)


@torch.inference_mode()
def judge(path: str, threads: int, prompt: list[int], answers: list[list[int]]) -> dict[str, Any]:
    """How far the exact modules' logits put each answer's tokens behind their own first choice.

    For each answer: the largest distance, in standard deviations of the logits at that position,
    and how many tokens are the first choice.
    """
    torch.set_num_threads(threads)
    longest = len(prompt) + max(map(len, answers))
    model = load_model(path, precision="exact", max_kv_size=longest)
    pool = model.make_pool(2 * longest + 64)
    start = Sequence(pool)
    last = model(torch.tensor([prompt]), [start], logits_to_keep=1)[0]
    gaps, same = [], []
    for answer in answers:
        text = start.fork()
        rest = model(torch.tensor([answer[:-1]]), [text])[0] if len(answer) > 1 else last[:0]
        logits = torch.cat([last, rest])
        chosen = logits[torch.arange(len(answer)), torch.tensor(answer)]
        gaps.append(((logits.amax(-1) - chosen) / logits.std(-1)).max().item())
        same.append(int((logits.argmax(-1) == torch.tensor(answer)).sum()))
        text.free()
    return {"gaps": gaps, "same": same}


@torch.inference_mode()
def contexts(
    path: str, threads: int, precision: str, lengths: list[int], tokens: int, rounds: int
) -> dict[str, Any]:
    """Seconds a token after texts of ``lengths`` tokens, a list of rounds for each length.

    The longest text is computed once; shorter ones are its beginning. ``errors``: how far the
    logits of the last token are from those of the modules, relative rms.
    """
    torch.set_num_threads(threads)
    longest = max(lengths) + tokens
    model = load_model(path, precision=precision, max_kv_size=longest)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, longest), generator=generator)
    pool = model.make_pool(2 * longest + 64)
    whole = Sequence(pool)
    model(ids[:, : max(lengths)], [whole], logits_to_keep=1)
    seconds: list[list[float]] = [[] for _ in lengths]
    for _ in range(rounds):
        for i, length in enumerate(lengths):
            text = _beginning(whole, length)
            decode.forward(model, [[1]], [text])
            begin = time.perf_counter()
            for token in range(2, tokens + 1):
                decode.forward(model, [[token]], [text])
            seconds[i].append((time.perf_counter() - begin) / (tokens - 1))
            text.free()
    errors = []
    for length in lengths:
        text, other = _beginning(whole, length), _beginning(whole, length)
        planned = decode.forward(model, [[1]], [text])[0]
        wanted = model(torch.tensor([[1]]), [other])[0, -1]
        errors.append(((planned - wanted).norm() / wanted.norm()).item())
        text.free()
        other.free()
    return {
        "seconds": seconds,
        "errors": errors,
        "weight_bytes": weight_bytes_per_token(model),
        "kv_bytes_a_position": kv_bytes_per_token(model.config, model.kv_dtype),
    }


def _beginning(whole: Sequence, length: int) -> Sequence:
    text = whole.fork()
    text.truncate(length)
    return text


def share_of_probe(
    path: str, threads: int, precision: str, prompt: list[int], rounds: int
) -> dict[str, Any]:
    """Seconds of two tokens and of plain reads of as many bytes in two ways, in turn."""
    torch.set_num_threads(threads)
    model = load_model(path, precision=precision, max_kv_size=len(prompt) + 2 * rounds + 2)
    weights = weight_bytes_per_token(model)
    steps = generate_step(prompt, model, max_tokens=2 * rounds + 2, logprobs=False)
    ids = [next(steps)[0], next(steps)[0]]
    seconds: list[float] = []
    reads: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for prefetch, taken in enumerate(reads):
            taken += ops.read_probe(weights, threads, 2, bool(prefetch))
        for _ in range(2):
            begin = time.perf_counter()
            ids.append(next(steps)[0])
            seconds.append(time.perf_counter() - begin)
    return {"ids": ids, "seconds": seconds, "reads": reads, "weight_bytes": weights}


def probe(threads: int) -> dict[str, float]:
    return {"gb_s": read_probe_gb_s(threads)}


if __name__ == "__main__":
    serve(Ours, judge=judge, contexts=contexts, share_of_probe=share_of_probe, probe=probe)
