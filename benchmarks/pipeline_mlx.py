"""One rank of mlx-lm's own pipeline, on MLX's CPU backend: ``python pipeline_mlx.py JSON``."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

TASK: dict[str, Any] = json.loads(sys.argv[1])
if TASK["cores"]:
    os.sched_setaffinity(0, TASK["cores"])

import mlx.core as mx  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402


def decode(model: Any) -> tuple[list[int], float]:
    """(tokens, seconds for one after the first)."""
    cache = make_prompt_cache(model)
    ids, found, first = TASK["prompt"][:16], [], 0.0
    for _ in range(TASK["tokens"]):
        token = int(mx.argmax(model(mx.array([ids]), cache=cache)[0, -1]).item())
        first = first or time.perf_counter()
        found.append(token)
        ids = [token]
    return found, (time.perf_counter() - first) / (len(found) - 1)


def main() -> None:
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend="ring")
    model, _ = load_model(Path(TASK["path"]), lazy=True)
    model.model.pipeline(group)
    mx.eval(model.parameters())
    decode(model)
    runs = [decode(model) for _ in range(TASK["rounds"])]
    result = {"ids": runs[-1][0], "token_s": [seconds for _, seconds in runs]}
    Path(TASK["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
