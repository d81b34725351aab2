"""How the ranks agree before the first pass: who is there, which layers each gets, all loaded.

Control messages go round the ring: rank 0 asks, every rank adds its answer, and rank 0 hears all of
them. A rank that cannot answer says why, and the others hear it from rank 0, which ends with it.
"""

from __future__ import annotations

import functools
import os
import socket
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import __version__
from ..checkpoint import Checkpoint
from ..device import resolve_device
from ..errors import PipelineError, Q4MetalError
from ..memory import available_memory, available_on_mps, working_bytes
from ..models.config import DecoderConfig
from .message import CONTROL_BYTES, Message
from .split import Capacity, LayerCost, explicit_split, split_layers
from .transport import Transport

_PROBE_BYTES = 128 << 20  # beyond most caches; six passes take 0.8 s at 1 GB/s


@dataclass(frozen=True)
class Settings:
    """How all ranks load the model: what rank 0's command line says. As ``load_model``'s options.

    ``split``           "auto", "memory", or the layers of each stage, "10,18"
    ``device``          of every rank; with "auto" each takes what its machine has
    ``stream_weights``  ranks that have no files get theirs from rank 0
    ``stage_timeout``   seconds without a sign of life after which a rank is lost
    """

    dtype: str | None = None
    precision: str | None = None
    max_kv_size: int | None = None
    force: bool = False
    eager: bool = False
    split: str = "auto"
    device: str | None = None
    stream_weights: bool = False
    stage_timeout: float = 30.0

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return getattr(torch, self.dtype) if self.dtype else None


@dataclass(frozen=True)
class RankInfo:
    """What a rank says of itself. Sizes in bytes, ``speed`` in bytes a second.

    ``memory``  what it may take; None where nobody can tell
    ``error``   why it cannot take part; then the rest may be missing
    ``checks``  facts that must be the same on every rank; see ``require_equal``
    ``streams`` it has no files and gets its tensors from rank 0, so none of them can differ
    """

    rank: int
    host: str
    version: str = __version__
    speed: float = 0.0
    memory: int | None = None
    error: str | None = None
    checks: dict[str, Any] = field(default_factory=dict)
    streams: bool = False


def ask_round(transport: Transport, content: dict[str, Any]) -> dict[str, Any]:
    """Rank 0: sends a control message round and returns it as it comes back."""
    message = Message(CONTROL_BYTES)
    message.put_control(content)
    sent = transport.send(message.tensor)
    answer = Message(CONTROL_BYTES)
    transport.receive(answer.buffer).wait()
    sent.wait()
    return answer.control()


def hear(transport: Transport) -> dict[str, Any]:
    """Other ranks: the next control message. It has to be passed on, with ``pass_on``."""
    message = Message(CONTROL_BYTES)
    transport.receive(message.buffer).wait()
    return message.control()


def pass_on(transport: Transport, content: dict[str, Any]) -> None:
    """Other ranks: sends a control message to the next rank."""
    message = Message(CONTROL_BYTES)
    message.put_control(content)
    transport.send(message.tensor).wait()


def describe(rank: int, split: str, device: str | None) -> RankInfo:
    """This rank, measured as far as ``split`` needs it, on what ``device`` means here."""
    try:
        kind = resolve_device(device).type
    except Q4MetalError:  # which it says when it loads
        kind = "cpu"
    memory = available_on_mps() if kind == "mps" else available_memory()
    if memory is not None:  # ranks of one machine share it
        memory //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    speed = read_speed(kind) if split == "auto" else 0.0
    return RankInfo(rank, socket.gethostname(), speed=speed, memory=memory)


@functools.cache
def read_speed(kind: str) -> float:
    """Bytes a second that this rank reads from memory: by the GPU on "mps", on the CPU with the
    threads that it computes with.
    """
    from ..ops import read_probe

    if kind == "mps":
        from ..mac_kernels import COLD_BYTES, read_gb_s

        return 1e9 * read_gb_s(COLD_BYTES, 1)
    threads = torch.get_num_threads()
    ways = [read_probe(_PROBE_BYTES, threads, 3, prefetch) for prefetch in (False, True)]
    return _PROBE_BYTES / min(min(seconds) for seconds in ways)


def require_answers(infos: list[dict[str, Any]]) -> None:
    """Raises PipelineError for the first rank that says it cannot take part."""
    for info in infos:
        if info.get("error"):
            raise PipelineError(f"rank {info['rank']} on {info['host']}: {info['error']}")


def require_equal(infos: list[RankInfo]) -> None:
    """Raises PipelineError, naming both values, where a rank differs from rank 0."""
    first = infos[0]
    for info in infos[1:]:
        facts: dict[str, tuple[Any, Any]] = {"package version": (first.version, info.version)}
        checks = {} if info.streams else first.checks
        facts |= {name: (value, info.checks.get(name)) for name, value in checks.items()}
        for name, (ours, theirs) in facts.items():
            if ours != theirs:
                raise PipelineError(
                    f"rank {info.rank} on {info.host} has another {name} than rank 0 on "
                    f"{first.host}: {theirs}, not {ours}; use the same on every machine."
                )


def plan_split(checkpoint: Checkpoint, settings: Settings, infos: list[RankInfo]) -> list[range]:
    """The layers of each rank of a model; all of its headers are here. As ``choose_split``."""
    from ..memory import kv_bytes_per_token
    from ..models.loading import read_family, resolve_context, resolve_precision

    _, config = read_family(checkpoint)
    context = resolve_context(config, settings.max_kv_size)
    exact = resolve_precision(settings.torch_dtype, settings.precision) == "exact"
    kv_dtype = torch.float32 if exact else checkpoint.scales_dtype
    kv_bytes = context * kv_bytes_per_token(config, kv_dtype, layers=1)
    return choose_split(settings, infos, checkpoint, config, kv_bytes)


def choose_split(
    settings: Settings,
    infos: list[RankInfo],
    checkpoint: Checkpoint,
    config: DecoderConfig,
    kv_bytes: int,
) -> list[range]:
    """The layers of each rank. ``kv_bytes``: of the KV cache, for one layer.

    Raises Q4MetalError for a split that cannot be, MemoryLimitError if nothing fits.
    """
    layers, first, last = layer_costs(checkpoint, config, kv_bytes)
    if settings.split not in ("auto", "memory"):
        return explicit_split(parse_split(settings.split), len(layers), len(infos))
    work = working_bytes(config)
    memory = [
        float("inf") if settings.force or info.memory is None else max(0, info.memory - work)
        for info in infos
    ]
    if settings.split == "auto":
        speed = [info.speed for info in infos]
    else:  # the fullest stage is the "slowest"
        speed = [float(info.memory or 1) for info in infos]
        layers = [LayerCost(cost.memory, cost.memory) for cost in layers]
        first, last = (LayerCost(cost.memory, cost.memory) for cost in (first, last))
    capacities = [Capacity(*pair) for pair in zip(speed, memory, strict=True)]
    return split_layers(layers, capacities, first=first, last=last)


def parse_split(text: str) -> list[int]:
    """The counts of "10,18". Raises Q4MetalError."""
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        raise Q4MetalError(
            f"--split is auto, memory, or the number of layers of each stage, like 10,18; not "
            f"{text!r}."
        ) from None


def layer_costs(
    checkpoint: Checkpoint, config: DecoderConfig, kv_bytes: int
) -> tuple[list[LayerCost], LayerCost, LayerCost]:
    """(each layer, what the first stage has besides, what the last one has), by file headers."""

    def size(prefix: str) -> int:
        return sum(t.nbytes for name, t in checkpoint.tensors.items() if name.startswith(prefix))

    sizes = [size(f"model.layers.{i}.") for i in range(config.num_hidden_layers)]
    layers = [LayerCost(bytes_, bytes_ + kv_bytes) for bytes_ in sizes]
    table = size("model.embed_tokens.")
    head = table if config.tied else size("lm_head.")
    return layers, LayerCost(table / config.vocab_size, table), LayerCost(head, head)
