"""From the chat's flags to a session with a loaded model; mistakes show before weights load."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .builtin_model import builtin_model
from .chat_session import ChatSession
from .config import GenerationDefaults
from .errors import Q4MetalError, TokenizerError
from .hub import resolve_model
from .models import CausalLM
from .pipeline import launch
from .pipeline.handshake import Settings
from .pipeline.liveness import DEFAULT_TIMEOUT
from .sampling import SamplingParams
from .terminal import status
from .tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded; None leaves it to ``load_model``."""

    model: str | None = None
    revision: str | None = None
    offline: bool = False
    dtype: str | None = None
    precision: str | None = None
    device: str = "auto"
    threads: int | None = None
    context: int | None = None
    force: bool = False
    eager: bool = False
    split: str | None = None  # layers of each rank under torchrun; None is "auto"
    stream_weights: bool = False  # ranks without files get theirs from rank 0
    stage_timeout: float | None = None  # seconds until a silent rank counts as lost; None is 30


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling settings that were given; None leaves one to the checkpoint."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None


def open_session(
    options: ModelOptions,
    sampling: SamplingOptions,
    *,
    chat_template: str | None = None,
    extra_eos_tokens: Sequence[str] = (),
    max_tokens: int = 2048,
    stop: Sequence[str] = (),
    system_prompt: str | None = None,
    use_template: bool = True,
    quiet: bool = False,
) -> ChatSession:
    """A session whose model is loaded; a status is shown meanwhile if stderr is a terminal.

    Raises Q4MetalError for all that is wrong with the model or does not fit into memory.
    """
    launch.set_threads(options.threads)
    with status("preparing the built-in model", quiet or options.model is not None):
        path = _directory(options)
    template = None if chat_template is None else _template_text(chat_template)
    tokenizer = Tokenizer.from_dir(path, chat_template=template)
    if use_template and not tokenizer.has_chat_template:
        raise TokenizerError(
            f"{path} has no chat template: give one with --chat-template FILE, or complete plain "
            "text with --ignore-chat-template."
        )
    extra = [_one_token(tokenizer, token) for token in extra_eos_tokens]
    model = _load(path, options, quiet)
    assert model.checkpoint is not None
    return ChatSession(
        model,
        tokenizer,
        sampling=merge_sampling(sampling, model.checkpoint.config.generation),
        max_tokens=max_tokens,
        stop=stop,
        extra_eos_token_ids=extra,
        system_prompt=system_prompt,
        use_template=use_template,
    )


def serve_stage(options: ModelOptions) -> bool:
    """What a rank does whose place under torchrun is not the first, until that is done.

    False if it went wrong, which rank 0 tells.
    """
    launch.set_threads(options.threads)
    if options.stream_weights:  # what is not here comes from rank 0, not from the hub
        options = replace(options, offline=True)
    transport = launch.join()
    watch, own = launch.watch_over(transport), _settings(options)
    return launch.serve(transport, lambda: _directory(options), watch, own)


def merge_sampling(given: SamplingOptions, defaults: GenerationDefaults) -> SamplingParams:
    """What was given, else what the checkpoint says, else greedy."""
    values = {name: value for name, value in asdict(defaults).items() if value is not None}
    values |= {name: value for name, value in asdict(given).items() if value is not None}
    return SamplingParams(**values)


def _load(path: Path, options: ModelOptions, quiet: bool) -> CausalLM:
    begin = time.perf_counter()
    with status(f"loading {path.name}", quiet):
        model = launch.load(path, _settings(options))
    assert model.checkpoint is not None
    gigabytes, seconds = model.checkpoint.weight_bytes / 1e9, time.perf_counter() - begin
    log.debug("loaded %s, %.2f GB, in %.1f s", path, gigabytes, seconds)
    return model


def _settings(options: ModelOptions) -> Settings:
    return Settings(
        options.dtype, options.precision, options.context, options.force, options.eager,
        options.split or "auto", options.device, options.stream_weights,
        options.stage_timeout or DEFAULT_TIMEOUT,
    )  # fmt: skip


def _directory(options: ModelOptions) -> Path:
    if options.model is None:
        return builtin_model()
    return resolve_model(options.model, revision=options.revision, offline=options.offline)


def _template_text(value: str) -> str:
    """The text of a template that was given as a file or as itself."""
    if "{{" in value or "{%" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise TokenizerError(
            f"--chat-template {value} cannot be read: {os.strerror(error.errno or 0)}."
        ) from None
    except ValueError:
        raise TokenizerError(f"--chat-template {value} is not UTF-8 text.") from None


def _one_token(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise Q4MetalError(f"--extra-eos-token {text} is {len(ids)} tokens of this model, not one.")
    return ids[0]
