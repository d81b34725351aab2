"""Chat with a model: ``python -m torch_q4metal.chat``.

In a terminal it is a conversation; with ``--prompt``, or with text piped in, one answer: the answer
alone on stdout, everything else on stderr. Torch is imported only once there is work to do.
"""

import contextlib
import io
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .cli import EXIT_ERROR, refuse_ring_options, run
from .errors import ContextLengthError, Q4MetalError
from .pipeline.launch import own_place, use_interface

if TYPE_CHECKING:
    from .chat_session import ChatSession

app = typer.Typer(rich_markup_mode="rich")

SAMPLING = "Sampling (unless given: the model's own generation_config.json)"
MODEL = "Model"
OUTPUT = "Output"


@app.command()
def main(
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id or directory of an MLX checkpoint; the built-in model if left out.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=MODEL)
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Use only what is cached.", rich_help_panel=MODEL)
    ] = False,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Answer this once and end; - reads standard input."),
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="The system message that opens the conversation.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, help="Most tokens of one answer.")
    ] = 2048,
    stop: Annotated[
        list[str] | None, typer.Option(help="End an answer before this text; repeatable.")
    ] = None,
    extra_eos_token: Annotated[
        list[str] | None, typer.Option(help="One more token that ends an answer; repeatable.")
    ] = None,
    temp: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="0 takes the likeliest token (greedy).", rich_help_panel=SAMPLING
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="1 is off.", rich_help_panel=SAMPLING),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="0 is off.", rich_help_panel=SAMPLING)
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="0 is off.", rich_help_panel=SAMPLING),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0.0, help="1 is off.", rich_help_panel=SAMPLING)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The same seed gives equal text on the same device.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--max-kv-size",
            "--ctx-size",
            min=1,
            help="Tokens the context holds; the model's own limit, at most 8192, if left out.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="A jinja file, or its text, instead of the model's own template."),
    ] = None,
    ignore_chat_template: Annotated[
        bool,
        typer.Option("--ignore-chat-template", help="Complete each prompt as plain text."),
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Activations.", rich_help_panel=MODEL),
    ] = None,
    precision: Annotated[
        Literal["exact", "fast", "int8"] | None,
        typer.Option(
            help="exact is float32 throughout, int8 takes 8-bit activations; fast if left out, "
            "and exact with --dtype float32.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "mps"],
        typer.Option(
            help="mps is the GPU of a Mac; auto takes it where there is one.",
            rich_help_panel=MODEL,
        ),
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", rich_help_panel=MODEL)
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Load even what does not fit into memory.", rich_help_panel=MODEL
        ),
    ] = False,
    eager: Annotated[
        bool,
        typer.Option(
            "--eager",
            help="Decode with the modules, not with the decode plan.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    split: Annotated[
        str | None,
        typer.Option(
            help="Layers of each of several ranks: auto (the default, by measured "
            "speed), memory, or numbers like 10,18.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    stage_timeout: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="With several ranks, seconds after which a silent one is lost and all end; rank "
            "0's counts, 30 if left out.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    stream_weights: Annotated[
        bool,
        typer.Option(
            "--stream-weights",
            help="With several ranks: those without the model's files get their layers from "
            "rank 0, and keep them in the cache.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    interface: Annotated[
        str | None,
        typer.Option(
            help="Under torchrun, the network interface by which other machines reach this one, "
            "like en0 or eth0.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Only answers and errors.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="One answer as a JSON object on stdout.", rich_help_panel=OUTPUT
        ),
    ] = False,
    stats: Annotated[
        bool | None,
        typer.Option(
            "--stats/--no-stats",
            help="Speed and memory after each answer; on for one answer, off in a conversation.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    no_history: Annotated[
        bool,
        typer.Option(
            "--no-history",
            help="Keep no history file (as Q4METAL_NOHISTORY=1).",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Log more; show tracebacks.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Chat with a 4-bit model, in a terminal or through pipes."""
    place = own_place()
    is_later_rank = place is not None and place.rank > 0
    # Under torchrun all ranks share a terminal, which is the first one's.
    _prepare_streams(
        quiet or (place is not None and is_later_rank and not place.has_terminal), debug
    )
    if place is None:
        refuse_ring_options(split, stream_weights, stage_timeout)
    use_interface(interface)
    if ignore_chat_template and (system_prompt or chat_template):
        given = "--system-prompt" if system_prompt else "--chat-template"
        raise typer.BadParameter("--ignore-chat-template leaves no use for it.", param_hint=given)
    model_options = (
        model, revision, offline, dtype, precision, device, threads, context, force, eager, split,
        stream_weights,
        stage_timeout,
    )  # fmt: skip
    if is_later_rank:  # the terminal and the question are the first one's
        from .chat_setup import ModelOptions, serve_stage

        if not serve_stage(ModelOptions(*model_options)):
            raise typer.Exit(EXIT_ERROR)
        return
    question = _question(prompt)
    if as_json and question is None:
        raise typer.BadParameter("it needs --prompt or piped text.", param_hint="--json")

    from .terminal import status

    with status("starting", quiet):  # importing torch takes seconds
        from .chat_setup import ModelOptions, SamplingOptions, open_session
    session = open_session(
        ModelOptions(*model_options),
        SamplingOptions(temp, top_p, top_k, min_p, repetition_penalty, seed),
        chat_template=chat_template,
        extra_eos_tokens=extra_eos_token or (),
        max_tokens=max_tokens,
        stop=stop or (),
        system_prompt=system_prompt,
        use_template=not ignore_chat_template,
        quiet=quiet,
    )
    with contextlib.closing(session):
        if question is not None:
            show_stats = not quiet if stats is None else stats
            _answer_once(session, question, as_json=as_json, show_stats=show_stats, quiet=quiet)
            return

        from .line_input import open_history
        from .repl import Repl

        Repl(
            session,
            open_history(not no_history),
            model_name=model or "built-in",
            show_stats=bool(stats),
            quiet=quiet,
            debug=debug,
            signals=place is None or place.has_terminal,
        ).run()


def _prepare_streams(quiet: bool, debug: bool) -> None:
    """The library's log goes to stderr; what a stream cannot encode becomes a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    from .terminal import show_log

    show_log(quiet, debug)
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _question(prompt: str | None) -> str | None:
    """The one question to answer, or None for a conversation at the terminal.

    Standard input that is no terminal is read to its end, unless ``--prompt`` has the text.
    """
    if prompt is not None and prompt != "-":
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise typer.BadParameter("it is not UTF-8 text.", param_hint="--prompt") from None
        if not prompt.strip():
            raise typer.BadParameter("it is empty.", param_hint="--prompt")
        return prompt
    if prompt is None and sys.stdin is not None and sys.stdin.isatty():
        return None
    data = b"" if sys.stdin is None else sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Q4MetalError(
            f"standard input is not UTF-8 text: byte 0x{data[error.start]:02x} at {error.start}."
        ) from None
    if not text.strip():
        raise typer.BadParameter(
            "standard input is empty; give the option a text, pipe one in, or start the chat in a "
            "terminal.",
            param_hint="--prompt",
        )
    return text.removesuffix("\n").removesuffix("\r")


def _answer_once(
    session: "ChatSession", question: str, *, as_json: bool, show_stats: bool, quiet: bool
) -> None:
    """The answer, or a JSON object with it, on stdout; statistics on stderr."""
    from .terminal import write_answer

    pieces = []
    try:
        for piece in session.ask(question):
            pieces.append(piece)
            if not as_json:
                write_answer(piece)
    except ContextLengthError as error:
        raise ContextLengthError(f"{error} Shorten the text or raise --ctx-size.") from None
    except KeyboardInterrupt:
        if pieces and not as_json:
            write_answer("\n")
        raise
    text, last = "".join(pieces), session.last
    if as_json:
        print(json.dumps({"text": text} | (asdict(last) if last else {}), ensure_ascii=False))
    elif not text.endswith("\n"):
        write_answer("\n")
    if last and not quiet:
        if last.finish_reason == "length":
            print(f"(cut at --max-tokens {session.max_tokens})", file=sys.stderr)
        elif last.finish_reason == "context":
            print(f"(cut where the context of {session.context} tokens is full)", file=sys.stderr)
    if last and show_stats:
        print(last, file=sys.stderr)


if __name__ == "__main__":
    run(app)
