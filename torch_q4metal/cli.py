"""What the command-line apps share: exit codes, one-line errors, a console on stderr."""

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

from .errors import Q4MetalError

if TYPE_CHECKING:
    import typer
    from rich.console import Console

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141


def console() -> "Console":
    """A rich console on stderr; rich honours NO_COLOR, TERM=dumb and a redirected stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def refuse(given: Mapping[str, object], why: str) -> None:
    """A usage error, ``why``, for the first option, by name, that was given: that has a value."""
    import typer

    for name, value in given.items():
        if value:
            raise typer.BadParameter(why, param_hint=name)


def refuse_ring_options(
    split: str | None, stream_weights: bool, stage_timeout: float | None
) -> None:
    """A usage error for the first of these that was given to a process without others."""
    refuse(
        {"--split": split, "--stream-weights": stream_weights, "--stage-timeout": stage_timeout},
        "it is for several ranks; start them with torchrun or torch_q4metal.cluster.",
    )


def run(app: "typer.Typer") -> NoReturn:
    """Run a typer app and exit: 0 done, 1 error in one line, 2 usage, 130 Ctrl-C, 141 closed pipe.

    A traceback is shown for errors nobody foresaw, and for every error where ``--debug`` is given.
    """
    # Read when torch is imported, which is later: OpenMP's idle workers would spin for milliseconds
    # on the cores that the kernels' own threads need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in sys.argv
    try:
        result = app(standalone_mode=False)
        sys.stdout.flush()
        sys.exit(result if isinstance(result, int) else 0)
    except Q4MetalError as error:
        _fail(str(error), EXIT_ERROR, debug)
    except BrokenPipeError:
        _exit_for_pipe()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # which typer makes an exit with 1
            _exit_for_pipe()
        raise
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        _exit_for_click(error)
        raise


def _exit_for_pipe() -> NoReturn:
    # The interpreter flushes stdout again on its way out: give it somewhere to write.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(EXIT_PIPE)


def _fail(sentence: str, code: int, debug: bool) -> NoReturn:
    if debug:
        raise
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)


def _exit_for_click(error: Exception) -> None:
    """Exit as click would where the exception is click's own (typer vendors or imports it)."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):
        show()
        sys.exit(code)
    if type(error).__name__ == "Abort":
        sys.exit(EXIT_INTERRUPTED)
