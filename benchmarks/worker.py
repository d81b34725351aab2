"""The process in which one engine runs, and the loop that times every engine in the same way.

A worker reads one JSON object a line from stdin and answers each with one on stdout:

    {"do": "load", "path": ..., "threads": 2, "context": 640, ...}   -> {"version": ..., ...}
    {"do": "run", "prompt": [ids], "tokens": 128}                    -> seconds, ids
    {"do": "rows", "prompts": [[ids]], "tokens": 32}                 -> seconds, ids
    {"do": "memory"}                                                 -> bytes

An engine is a class with the methods of ``Engine``. This file needs nothing but numpy: it runs in
every peer's environment.
"""

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Step = tuple[int, Any]  # the greedy token, and the logits it was the largest of, or None
RowsStep = tuple[list[int], Any]


class Engine(ABC):
    """A loaded model. Every text begins anew: nothing is kept of the last one."""

    version: str

    @abstractmethod
    def generate(self, prompt: list[int], tokens: int) -> Iterator[Step]:
        """Greedy tokens; the first comes when the prompt is done. End tokens do not stop it."""

    def generate_rows(self, prompts: list[list[int]], tokens: int) -> Iterator[RowsStep]:
        """The same for several texts decoded together."""
        raise NotImplementedError

    def details(self) -> dict[str, Any]:
        """What the report says of this engine."""
        return {}


def timed(steps: Iterator[Any]) -> dict[str, Any]:
    """Seconds to the first token, seconds of those after it, and what was drawn."""
    begin = time.perf_counter()
    token, logits = next(steps)
    first = time.perf_counter()
    tokens = [token]
    for step in steps:
        tokens.append(step[0])
        logits = step[1]
    end = time.perf_counter()
    finite = logits is None or bool(np.isfinite(np.asarray(logits)).all())
    return {"prefill_s": first - begin, "decode_s": end - first, "ids": tokens, "finite": finite}


def memory() -> dict[str, int]:
    """Bytes: the largest resident size so far, and what of the present one is not mapped files."""
    fields = {}
    with open("/proc/self/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("VmHWM", "VmRSS", "RssAnon", "RssFile"):
                fields[name] = int(value.split()[0]) * 1024
    return fields


def serve(load: Callable[..., Engine], **more: Callable[..., dict[str, Any]]) -> None:
    """Answers commands until stdin ends. ``more``: commands that need no engine."""
    # Libraries print to stdout: answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Engine | None = None
    for line in sys.stdin:
        command = json.loads(line)
        what = command.pop("do")
        answer: dict[str, Any]
        if what == "memory":
            answer = memory()
        elif what in more:
            answer = more[what](**command)
        elif what == "load":
            engine = load(**command)
            answer = {"version": engine.version, **engine.details()}
        else:
            assert engine is not None
            if what == "run":
                answer = timed(engine.generate(command["prompt"], command["tokens"]))
            else:
                answer = timed(engine.generate_rows(command["prompts"], command["tokens"]))
        print(json.dumps(answer), file=answers, flush=True)
