"""From processes that know their rank to a model that all of them run together.

Rank 0 calls ``lead`` and gets a model that the generate functions take like any other; every other
rank calls ``serve``, which returns when rank 0 is done.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import PipelineError, Q4MetalError

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..models.base import CausalLM
    from .handshake import Settings
    from .transport import Transport
    from .watched import Watch

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


def use_interface(name: str | None) -> None:
    """Before ``join``, under torchrun: the network interface whose address the others are given.

    Raises PipelineError if it has no address, or where another option says it.
    """
    if name is None:
        return
    if own_place() is None:
        raise PipelineError("--interface is for several ranks; start them with torchrun.")
    if _taken is not None:
        raise PipelineError(
            f"--interface {name} goes before the --: torch_q4metal.cluster run --interface {name}."
        )
    from .addresses import interface_address

    interface_address(name)
    os.environ["GLOO_SOCKET_IFNAME"] = name  # gloo reads it


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
    from ..device import refuse_mps_fallback

    refuse_mps_fallback()
    from .gloo import GlooTransport

    return GlooTransport()


def call_roll(
    transport: Transport, watch: Watch | None, timeout: float
) -> tuple[Transport, dict[str, Any]]:
    """Rank 0: hears who is there, and watches over them, as they will with the next message.

    Returns the transport to use from here on, and what the next message has to say besides.
    Raises PipelineError, and ends the others, if a rank has another version of this package.
    """
    from .handshake import RankInfo, ask_round, require_equal

    members = ask_round(transport, {"join": [_join(transport.rank, watch)]})["join"]
    roll = {"members": members, "secret": secrets.token_hex(16), "timeout": timeout}
    if watch is not None:
        transport = _watched(transport, watch, roll)
    try:
        require_equal([RankInfo(**_facts(member)) for member in members])
    except PipelineError as error:
        stop(transport, watch, str(error))
        raise
    return transport, roll


def stop(transport: Transport, watch: Watch | None, why: str | None) -> None:
    """Rank 0: ends all other ranks that serve no model yet. ``why``: None if all is well."""
    from .handshake import ask_round

    ask_round(transport, {"stop": why})
    if watch is not None:
        watch.close()


def lead(
    transport: Transport,
    path: Callable[[], Path],
    settings: Settings,
    watch: Watch | None = None,
    on_close: Callable[[], None] = lambda: None,
) -> CausalLM:
    """Rank 0: its stage of the model in the directory that ``path`` gives.

    Its ``engine`` drives all ranks, until ``engine.close()``. ``watch`` is this rank's over the
    others, and all have one or none has. ``on_close`` is called when all have ended.

    Raises what ``load_model`` raises, and PipelineError for what other ranks have to say.
    """
    from .driver import Driver
    from .handshake import RankInfo, ask_round, plan_split, require_answers
    from .weight_stream import send_weights

    transport, roll = call_roll(transport, watch, settings.stage_timeout)
    roll["hello"] = asdict(settings)
    stage = _Stage(transport.rank, path, settings)
    try:
        hello = stage.hello(settings)
        roll["facts"] = stage.facts
        answer = ask_round(transport, roll | {"ranks": [hello]})
        require_answers(answer["ranks"])
        infos = [RankInfo(**info) for info in answer["ranks"]]
        ranges = plan_split(stage.checkpoint, settings, infos)
        send_weights(transport, stage.checkpoint, ranges, infos)
        load = {"load": [[part.start, part.stop] for part in ranges], "ranks": answer["ranks"]}
        answer = ask_round(transport, load | {"loaded": [stage.load(settings, ranges[0])]})
        require_answers(answer["loaded"])
    except Q4MetalError as error:
        stop(transport, watch, str(error))
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

    def close() -> None:
        if watch is not None:
            watch.close()
        on_close()

    Driver(transport, stage.model, answer["loaded"], close)
    return stage.model


def load(path: Path, settings: Settings) -> CausalLM:
    """The model in a directory: all of it in this process, or under torchrun rank 0's stage."""
    if own_place() is not None:
        transport = join()
        watch = watch_over(transport)
        return lead(transport, lambda: path, settings, watch, transport.close)
    from .. import decode
    from ..models import load_model

    model = load_model(
        path, settings.torch_dtype, settings.device, settings.precision,
        max_kv_size=settings.max_kv_size, force=settings.force,
    )  # fmt: skip
    model.eager = settings.eager
    decode.plan_of(model)  # now: a GPU's kernels are compiled and checked before anybody waits
    return model


def serve(
    transport: Transport,
    path: Callable[[], Path],
    watch: Watch | None = None,
    own: Settings | None = None,
) -> bool:
    """Every other rank: loads its stage of the model, and computes until rank 0 is done.

    Or says what it is and measures its links, if that is what rank 0 wants.

    ``own``: what this rank's command line says; rank 0 refuses another precision than its own.

    False if something went wrong that rank 0 tells about. Raises PipelineError if a neighbour is
    gone.
    """
    from .handshake import Settings, hear, pass_on
    from .survey import own_facts, relay_links
    from .weight_stream import WeightReceiver
    from .worker import Worker

    stage = _Stage(transport.rank, path, own)
    receiver = WeightReceiver(transport)
    settings = Settings()
    while True:
        content = hear(transport)
        if watch is not None and "links" in content:
            relay_links(transport, watch)
            continue
        if watch is not None and "members" in content:
            transport = _watched(transport, watch, content)
        if "join" in content:
            content["join"].append(_join(transport.rank, watch))
        elif "survey" in content:
            content["survey"].append(asdict(own_facts(transport.rank)))
        elif "hello" in content:
            settings = Settings(**content["hello"])
            content["ranks"].append(stage.hello(settings, content))
        elif "load" in content:
            stage.checkpoint = receiver.checkpoint() or stage.checkpoint
            content["loaded"].append(stage.load(settings, range(*content["load"][transport.rank])))
        receiver.answer(content)
        pass_on(transport, content)
        receiver.follow(content)
        if "stop" in content:
            if watch is not None:
                watch.close()
            return content["stop"] is None
        if "start" in content:
            break
    assert stage.model is not None
    ended_well = Worker(transport, stage.model).run()
    if watch is not None:
        watch.close(told=not ended_well)
    return ended_well


def watch_over(transport: Transport) -> Watch:
    """This rank's watch over the others. Raises PipelineError."""
    from .liveness import Channel, Liveness

    channel: Channel
    if _taken is None:
        from .addresses import torchrun_address
        from .liveness_tcp import TcpChannel

        channel = TcpChannel(torchrun_address())
    else:
        from .liveness_zmq import ZmqChannel
        from .zmq_transport import ZmqTransport

        assert isinstance(transport, ZmqTransport), "what torch_q4metal.cluster joins"
        channel = ZmqChannel(transport.key, transport.address)
    agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ and _taken is None else None
    return Liveness(channel, agent=agent)


def _join(rank: int, watch: Watch | None) -> dict[str, Any]:
    """What a rank says of itself first. Another version may not understand more."""
    host = socket.gethostname()
    if watch is None:
        member = {"rank": rank, "host": host, "address": "", "port": 0}
    else:
        member = watch.member(rank, host)
    return member | {"version": __version__}


def _facts(member: dict[str, Any]) -> dict[str, Any]:
    return {name: member[name] for name in ("rank", "host", "version")}


def _watched(transport: Transport, watch: Watch, roll: dict[str, Any]) -> Transport:
    """Starts the watch with what rank 0 sends round; the transport asks it about broken links."""
    from .liveness import Member
    from .watched import WatchedTransport

    members = [
        Member(one["rank"], one["host"], one["address"], one["port"]) for one in roll["members"]
    ]
    watch.start(transport.rank, members, roll["secret"], roll["timeout"])
    return WatchedTransport(transport, watch)


class _Stage:
    """One rank's part, and what it says when it is asked about it."""

    def __init__(self, rank: int, path: Callable[[], Path], own: Settings | None) -> None:
        self.facts = ""
        self._own = own
        self.model: CausalLM | None = None
        self.error: Q4MetalError | None = None
        self.checkpoint: Checkpoint
        self._rank = rank
        self._path = path

    def hello(self, settings: Settings, roll: dict[str, Any] | None = None) -> dict[str, Any]:
        """Looks at the checkpoint's headers, and at the machine.

        ``roll``: rank 0's message, with whose facts this rank compares its own.
        """
        from ..checkpoint import Checkpoint
        from .fingerprint import facts_of
        from .handshake import describe

        info = describe(self._rank, settings.split, settings.device)
        try:
            self.checkpoint = Checkpoint.open(self._path())
        except Q4MetalError as error:
            if settings.stream_weights and self._rank > 0:
                logger.info("the model is not on this machine: rank 0 sends what is needed of it")
                logger.debug("%s", error)
                return asdict(replace(info, streams=True))
            return self._failed(error, asdict(info))
        self.facts = facts_of(self.checkpoint)
        if roll is not None:
            try:
                self._compare(roll, settings)
            except PipelineError as error:
                return self._failed(error, asdict(info))
        return asdict(info)

    def _compare(self, roll: dict[str, Any], settings: Settings) -> None:
        """Raises PipelineError where this rank's files or precision are not rank 0's."""
        from ..models.loading import resolve_precision
        from .fingerprint import difference, require_same

        found: tuple[str, Any, Any] | None = None
        if roll["facts"]:
            found = difference(roll["facts"], self.facts)
        if self._own is not None and found is None:
            theirs, ours = (
                resolve_precision(one.torch_dtype, one.precision) for one in (settings, self._own)
            )
            found = ("precision", theirs, ours) if theirs != ours else None
        require_same(roll["members"][0]["host"], found)

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
            self.model.eager = settings.eager
            plan = decode.plan_of(self.model)  # which checks a GPU's kernels
        except Q4MetalError as error:
            return self._failed(error, info)
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
