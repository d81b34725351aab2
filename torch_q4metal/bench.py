"""Measures prefill, decode and memory of one model: ``python -m torch_q4metal.bench --model M``.

Prompts are random tokens, one for each text of ``--batch``; decoding is greedy and goes on past end
tokens. Reported are medians of ``--repeats`` runs after one run that is not counted. ``--json``
makes the last line of stdout one JSON object. GB/s are 10**9 bytes a second; those of the read
probe are of the device that the model is on. Under torchrun the ranks compute together; memory is
rank 0's.

``--mac`` measures Metal kernels, and models of the shapes in predictions.py, and says which of the
README's predictions hold.
"""

import functools
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .cli import EXIT_ERROR, refuse_ring_options, run
from .terminal import show_log, status

if TYPE_CHECKING:
    from .models.base import CausalLM

app = typer.Typer(add_completion=False, rich_markup_mode=None)

PROBE_BYTES = 1 << 30  # of a CPU, beyond every cache
_PROBE_ROUNDS = 5


@dataclass(frozen=True)
class Result:
    """One line of a benchmark table. Times in seconds, sizes in bytes, medians over the runs.

    Tokens a second are those of all texts of the batch together; the time to the first token is
    that of the text that gets its own last.
    """

    model: str
    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float
    decode_gb_s: float  # weight_bytes times decode_tok_s / batch
    read_probe_gb_s: float  # of the CPU's memory by its threads, or of the GPU's by a kernel
    probe_share: float  # decode_gb_s / read_probe_gb_s
    peak_rss_bytes: int
    gpu_bytes: int  # buffers of the GPU, as torch holds them after the runs; 0 on the CPU
    peak_memory_bytes: int  # of both, each byte once (memory.py)
    import_rss_bytes: int  # after importing torch, before anything else
    weight_bytes: int  # weights that one decoded token reads
    file_bytes: int  # all tensors of the checkpoint
    kv_bytes: int  # of the longest text measured
    prompt_tokens: int
    generation_tokens: int
    threads: int
    cpu: str
    device: str
    kernels: str
    dtype: str
    precision: str
    eager: bool
    batch: int
    ranks: int
    stages: list[dict[str, Any]]  # what each rank holds; empty for one process
    torch: str
    version: str


def weight_bytes_per_token(model: "CausalLM") -> int:
    """Bytes of weights that one token reads: all, but only one row of an untied embedding."""
    from .checkpoint import Checkpoint

    assert model.checkpoint is not None
    checkpoint = Checkpoint.open(model.checkpoint.path)  # all of it: the model may be a stage
    total = checkpoint.weight_bytes
    if model.config.tied:
        return total
    path = "model.embed_tokens"
    table = [info for name, info in checkpoint.tensors.items() if name.startswith(f"{path}.")]
    size = sum(info.end - info.begin for info in table)
    return total - size + size // model.config.vocab_size


def read_probe_gb_s(threads: int, device: str = "cpu") -> float:
    """GB/s of plain reads: medians of five passes.

    On the CPU sequential ones of 1 GiB, the better of two ways; on "mps" by a kernel that only
    reads.
    """
    from .ops import read_probe

    if device == "mps":
        from .mac_kernels import COLD_BYTES, read_gb_s

        return read_gb_s(COLD_BYTES, _PROBE_ROUNDS)
    ways = [read_probe(PROBE_BYTES, threads, _PROBE_ROUNDS, prefetch) for prefetch in (False, True)]
    return PROBE_BYTES / min(statistics.median(seconds) for seconds in ways) / 1e9


def measure(
    path_or_id: str,
    prompt_tokens: int,
    generation_tokens: int,
    repeats: int,
    precision: str | None,
    import_rss: int,
    eager: bool = False,
    revision: str | None = None,
    offline: bool = False,
    batch: int = 1,
    split: str = "auto",
    stream_weights: bool = False,
    stage_timeout: float = 30.0,
    device: str = "auto",
) -> Result:
    """Loads the model and measures it. Raises what ``load_model`` raises."""
    import torch

    from . import __version__, ops
    from .checkpoint import Checkpoint
    from .decode_time import time_decoding
    from .hub import resolve_model
    from .machine import cpu_name, peak_rss
    from .memory import gpu_bytes, kv_bytes_per_token, peak_memory
    from .pipeline import launch
    from .pipeline.handshake import Settings

    threads = torch.get_num_threads()
    path = resolve_model(path_or_id, revision=revision, offline=offline)
    context = prompt_tokens + generation_tokens
    settings = Settings(
        None,
        precision,
        context,
        eager=eager,
        split=split,
        device=device,
        stream_weights=stream_weights,
        stage_timeout=stage_timeout,
    )
    model = launch.load(path, settings)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    prompts = torch.randint(vocabulary, (batch, prompt_tokens), generator=generator).tolist()
    time_decoding(model, prompts, min(generation_tokens, 8))
    runs = [time_decoding(model, prompts, generation_tokens) for _ in range(repeats)]
    stages = [] if model.engine is None else model.engine.stages
    if model.engine is not None:
        model.engine.close()
    ttft = statistics.median(first for first, _ in runs)
    tok_s = statistics.median(rate for _, rate in runs)
    weights = weight_bytes_per_token(model)
    peak, on_gpu = peak_rss(), gpu_bytes(model.device)
    peak_with_gpu = peak_memory(model.device)
    probe = read_probe_gb_s(threads, model.device.type)  # last: it takes memory of its own
    return Result(
        model=path_or_id,
        prefill_tok_s=batch * prompt_tokens / ttft,
        decode_tok_s=tok_s,
        ttft_s=ttft,
        decode_gb_s=weights * tok_s / batch / 1e9,
        read_probe_gb_s=probe,
        probe_share=weights * tok_s / batch / 1e9 / probe,
        peak_rss_bytes=peak,
        gpu_bytes=on_gpu,
        peak_memory_bytes=peak_with_gpu,
        import_rss_bytes=import_rss,
        weight_bytes=weights,
        file_bytes=Checkpoint.open(path).weight_bytes,
        kv_bytes=kv_bytes_per_token(model.config, model.kv_dtype)
        * (prompt_tokens + generation_tokens)
        * batch,
        prompt_tokens=prompt_tokens,
        generation_tokens=generation_tokens,
        threads=threads,
        cpu=cpu_name(),
        device=model.device.type,
        kernels=ops.cpu_kernels() if model.device.type == "cpu" else "metal",
        dtype=str(model.dtype).removeprefix("torch."),
        precision=precision or "fast",  # what load_model takes for None
        eager=eager,
        batch=batch,
        ranks=len(stages) or 1,
        stages=stages,
        torch=torch.__version__,
        version=__version__,
    )


def _print_table(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    where = f"{result.cpu}, {result.threads} threads"
    of_gpu = "" if result.device == "cpu" else " of the GPU"
    if of_gpu:
        where = f"the GPU of {result.cpu}"
    if result.ranks > 1:
        where = f"{result.ranks} ranks, the first on {where}"
    table = Table(title=f"{Path(result.model).absolute().name} on {where}")
    table.add_column("measured")
    table.add_column("", justify="right")
    rows = [
        (f"prefill, {result.prompt_tokens} tokens", f"{result.prefill_tok_s:.1f} tok/s"),
        ("time to first token", f"{result.ttft_s * 1e3:.0f} ms"),
        (f"decode, {result.generation_tokens} tokens", f"{result.decode_tok_s:.1f} tok/s"),
        ("weights read in decode", f"{result.decode_gb_s:.2f} GB/s"),
        (f"plain-read probe{of_gpu}", f"{result.read_probe_gb_s:.2f} GB/s"),
        ("share of the probe", f"{result.probe_share:.0%}"),
        ("weights a token", f"{result.weight_bytes / 1e6:.1f} MB"),
        ("peak RSS", f"{result.peak_rss_bytes / 1e6:.0f} MB"),
        ("RSS after importing torch", f"{result.import_rss_bytes / 1e6:.0f} MB"),
    ]
    if of_gpu:
        rows += [
            ("buffers of the GPU", f"{result.gpu_bytes / 1e6:.0f} MB"),
            ("peak memory with these buffers", f"{result.peak_memory_bytes / 1e6:.0f} MB"),
        ]
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


def _measure_mac(size: int | None, repeats: int, tokens: int, as_json: bool) -> None:
    from .bench_mac import measure as measure_mac

    where, rows = measure_mac(size, repeats, tokens)
    print(f"{where}; predicted numbers are those of the README")
    print(f"{'measured':<46} {'':>10} {'':<10} {'predicted':>16}")
    done = []
    for row in rows:  # each as it comes: all of them take minutes
        print(row, flush=True)
        done.append(row)
    if as_json:
        found = [asdict(row) | {"verdict": row.verdict} for row in done]
        print(json.dumps({"device": where, "rows": found}))


@app.command()
def main(
    model: Annotated[
        str | None,
        typer.Option("--model", help="directory or hub id; the built-in model if left out"),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option("-p", "--prompt-tokens", min=1, help="tokens of the prompt")
    ] = 512,
    generation_tokens: Annotated[
        int, typer.Option("-g", "--generation-tokens", min=2, help="tokens to decode")
    ] = 128,
    repeats: Annotated[int, typer.Option("-n", "--repeats", min=1, help="runs; medians count")] = 3,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="threads; torch's number if left out")
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="fast (default), exact or int8")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "mps"],
        typer.Option(help="mps is the GPU of a Mac; auto takes it where there is one"),
    ] = "auto",
    eager: Annotated[
        bool, typer.Option("--eager", help="decode with the modules, not with the decode plan")
    ] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="branch, tag, commit")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="never ask the hub")] = False,
    batch: Annotated[
        int, typer.Option("-b", "--batch", min=1, max=8, help="texts that are decoded together")
    ] = 1,
    split: Annotated[
        str | None,
        typer.Option(help="layers of each of several ranks: auto (default), memory or 10,18"),
    ] = None,
    stage_timeout: Annotated[
        float | None,
        typer.Option(
            min=1, help="seconds after which a silent rank is lost; rank 0's counts; 30 if left out"
        ),
    ] = None,
    stream_weights: Annotated[
        bool,
        typer.Option("--stream-weights", help="ranks without files get theirs from rank 0"),
    ] = False,
    interface: Annotated[
        str | None, typer.Option(help="under torchrun, the network that other machines are on")
    ] = None,
    mac: Annotated[
        bool,
        typer.Option("--mac", help="test the README's predictions for Apple chips, on a Mac"),
    ] = False,
    mac_bytes: Annotated[
        int | None,
        typer.Option(
            "--mac-bytes", help="weights of a pass with --mac, and of each model, at most"
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="last line of stdout: one JSON object")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
) -> None:
    """Measures prefill and decode speed, and memory, of one model."""
    show_log(debug=debug)
    if mac or mac_bytes is not None:
        _measure_mac(mac_bytes, repeats, generation_tokens, as_json)
        return
    import torch  # noqa: F401

    from .machine import peak_rss

    import_rss = peak_rss()
    from .builtin_model import builtin_model
    from .hub import resolve_model
    from .pipeline import launch
    from .pipeline.liveness import DEFAULT_TIMEOUT

    place = launch.own_place()
    if place is None:
        refuse_ring_options(split, stream_weights, stage_timeout)
    launch.use_interface(interface)
    launch.set_threads(threads)
    if place is not None and place.rank > 0:
        source = model or str(builtin_model())
        directory = functools.partial(
            resolve_model, source, revision=revision, offline=offline or stream_weights
        )
        transport = launch.join()
        from .pipeline.handshake import Settings

        own = Settings(precision=precision)
        if not launch.serve(transport, directory, launch.watch_over(transport), own):
            raise typer.Exit(EXIT_ERROR)
        return
    if model is None:
        model = str(builtin_model())
    with status("measuring"):
        result = measure(
            model,
            prompt_tokens,
            generation_tokens,
            repeats,
            precision,
            import_rss,
            eager,
            revision,
            offline,
            batch,
            split or "auto",
            stream_weights,
            stage_timeout or DEFAULT_TIMEOUT,
            device,
        )
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        _print_table(result)


if __name__ == "__main__":
    run(app)
