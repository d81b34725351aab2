"""From processes that know their rank to a model that all of them run together.

Rank 0 calls ``lead`` and gets a model that the generate functions take like any other; every other
rank calls ``serve``, which returns when rank 0 is done.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PipelineError, Q4MetalError

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..models.base import CausalLM
    from .handshake import RankInfo, Settings
    from .transport import Transport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """This process among the others. ``has_terminal``: it is in the terminal's foreground, and so
    gets Ctrl-C as a signal; torchrun's processes do not.
    """

    rank: int
    world_size: int
    has_terminal: bool = False


_taken: tuple[Place, Callable[[], Transport]] | None = None


def take_place(place: Place, join: Callable[[], Transport]) -> None:
    """Makes this process one of several that torchrun did not start; ``join`` gives the ring."""
    global _taken
    _taken = place, join


def own_place() -> Place | None:
    """This process's place among several; None if it is alone."""
    return torchrun_place() if _taken is None else _taken[0]


def torchrun_place() -> Place | None:
    """The place that torchrun gives this process in its environment; None if it is alone."""
    values = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")]
    if any(value is None for value in values) or int(values[1] or 1) < 2:
        return None
    return Place(int(values[0] or 0), int(values[1] or 1))


def set_threads(threads: int | None) -> None:
    """``threads``, or this machine's share of them: torchrun would leave one to each process.

    ``OMP_NUM_THREADS`` other than the 1 that torchrun sets is somebody's wish and stays.
    """
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if threads is not None:
        torch.set_num_threads(threads)
    elif local > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, (cores or 1) // local))


def join() -> Transport:
    """The ring of all ranks. Raises PipelineError."""
    if _taken is not None:
        return _taken[1]()
    if os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") == "1":
        raise PipelineError(
            "PYTORCH_ENABLE_MPS_FALLBACK=1 makes torch.distributed silently wrong; unset it."
        )
    from .gloo import GlooTransport

    return GlooTransport()


def lead(
    transport: Transport,
    path: Callable[[], Path],
    settings: Settings,
    watch: Callable[[list[RankInfo]], object] = lambda infos: None,
    on_close: Callable[[], None] = lambda: None,
) -> CausalLM:
    """Rank 0: its stage of the model in the directory that ``path`` gives.

    Its ``engine`` drives all ranks, until ``engine.close()``. ``watch`` is called on every rank
    when all are known and none has loaded yet, ``on_close`` here when all have ended.

    Raises what ``load_model`` raises, and PipelineError for what other ranks have to say.
    """
    from .driver import Driver
    from .handshake import RankInfo, ask_round, require_answers
    from .weight_stream import send_weights

    stage = _Stage(transport.rank, path)
    answer = ask_round(transport, {"hello": asdict(settings), "ranks": [stage.hello(settings)]})
    try:
        require_answers(answer["ranks"])
        infos = [RankInfo(**info) for info in answer["ranks"]]
        ranges = stage.split(settings, infos)
        watch(infos)
        send_weights(transport, stage.checkpoint, ranges, infos)
        load = {"load": [[part.start, part.stop] for part in ranges], "ranks": answer["ranks"]}
        answer = ask_round(transport, load | {"loaded": [stage.load(settings, ranges[0])]})
        require_answers(answer["loaded"])
    except Q4MetalError as error:
        ask_round(transport, {"stop": str(error)})
        if stage.error is not None:
            raise stage.error from None
        raise
    ask_round(transport, {"start": True})
    for info, loaded in zip(infos, answer["loaded"], strict=True):
        part = ranges[info.rank]
        logger.debug(
            "rank %d on %s: layers %d to %d, %.2f GB", info.rank, info.host, part.start,
            part.stop - 1, loaded["weight_bytes"] / 1e9,
        )  # fmt: skip
    assert stage.model is not None
    Driver(transport, stage.model, answer["loaded"], on_close)
    return stage.model


def load(path: Path, settings: Settings) -> CausalLM:
    """The model in a directory: all of it in this process, or under torchrun rank 0's stage."""
    if own_place() is not None:
        transport = join()
        return lead(transport, lambda: path, settings, on_close=transport.close)
    from ..models import load_model

    model = load_model(
        path, settings.torch_dtype, settings.device, settings.precision,
        max_kv_size=settings.max_kv_size, force=settings.force,
    )  # fmt: skip
    model.eager = settings.eager
    return model


def serve(
    transport: Transport,
    path: Callable[[], Path],
    watch: Callable[[list[RankInfo]], object] = lambda infos: None,
) -> bool:
    """Every other rank: loads its stage of the model, and computes until rank 0 is done.

    False if something went wrong that rank 0 tells about. Raises PipelineError if a neighbour is
    gone.
    """
    from .handshake import RankInfo, Settings, hear, pass_on
    from .weight_stream import WeightReceiver
    from .worker import Worker

    stage = _Stage(transport.rank, path)
    receiver = WeightReceiver(transport)
    settings = Settings()
    while True:
        content = hear(transport)
        if "hello" in content:
            settings = Settings(**content["hello"])
            content["ranks"].append(stage.hello(settings))
        elif "load" in content:
            watch([RankInfo(**info) for info in content["ranks"]])
            stage.checkpoint = receiver.checkpoint() or stage.checkpoint
            content["loaded"].append(stage.load(settings, range(*content["load"][transport.rank])))
        receiver.answer(content)
        pass_on(transport, content)
        receiver.follow(content)
        if "stop" in content:
            return False
        if "start" in content:
            break
    assert stage.model is not None
    return Worker(transport, stage.model).run()


class _Stage:
    """One rank's part, and what it says when it is asked about it."""

    def __init__(self, rank: int, path: Callable[[], Path]) -> None:
        self.model: CausalLM | None = None
        self.error: Q4MetalError | None = None
        self.checkpoint: Checkpoint
        self._rank = rank
        self._path = path

    def hello(self, settings: Settings) -> dict[str, Any]:
        """Looks at the checkpoint's headers, and at the machine."""
        from ..checkpoint import Checkpoint
        from .handshake import describe

        info = describe(self._rank, settings.split)
        try:
            self.checkpoint = Checkpoint.open(self._path())
        except Q4MetalError as error:
            if settings.stream_weights and self._rank > 0:
                logger.info("%s The weights come from rank 0.", error)
                return asdict(replace(info, streams=True))
            return self._failed(error, asdict(info))
        return asdict(info)

    def split(self, settings: Settings, infos: list[RankInfo]) -> list[range]:
        """Rank 0: the layers of each rank."""
        import torch

        from ..memory import kv_bytes_per_token
        from ..models.loading import read_family, resolve_context, resolve_precision
        from .handshake import choose_split, require_equal

        require_equal(infos)
        _, config = read_family(self.checkpoint)
        context = resolve_context(config, settings.max_kv_size)
        exact = resolve_precision(settings.torch_dtype, settings.precision) == "exact"
        kv_dtype = torch.float32 if exact else self.checkpoint.scales_dtype
        kv_bytes = context * kv_bytes_per_token(config, kv_dtype, layers=1)
        return choose_split(settings, infos, self.checkpoint, config, kv_bytes)

    def load(self, settings: Settings, layers: range) -> dict[str, Any]:
        """Loads the layers, and says how much that took."""
        from .. import decode
        from ..models import load_model

        info = {"rank": self._rank, "host": os.uname().nodename}
        try:
            self.model = load_model(
                self.checkpoint,
                settings.torch_dtype,
                settings.device,
                settings.precision,
                max_kv_size=settings.max_kv_size,
                force=settings.force,
                layers=layers,
            )
        except Q4MetalError as error:
            return self._failed(error, info)
        self.model.eager = settings.eager
        plan = decode.plan_of(self.model)
        checkpoint = self.model.checkpoint
        assert checkpoint is not None
        return info | {
            "reads_prompts": plan is not None and plan.reads_prompts,
            "layers": [layers.start, layers.stop],
            "weight_bytes": checkpoint.weight_bytes,
            "mapped_bytes": checkpoint.mapped_bytes,
        }

    def _failed(self, error: Q4MetalError, info: dict[str, Any]) -> dict[str, Any]:
        self.error = error
        return info | {"error": str(error)}
