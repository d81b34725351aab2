"""mlx-lm on MLX's CPU backend: the project whose format this is, for a remark beside the table.

It takes as many threads as it likes; ``threads`` is not heeded.
"""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from worker import Engine, Step, serve


class Mlx(Engine):
    version = mlx_lm.__version__

    def __init__(self, path: str, threads: int, context: int, rows: bool = False) -> None:
        self._model, _ = load_model(Path(path))

    def generate(self, prompt: list[int], tokens: int) -> Iterator[Step]:
        cache = make_prompt_cache(self._model)
        ids = prompt
        for _ in range(tokens):
            logits = self._model(mx.array([ids]), cache=cache)[0, -1].astype(mx.float32)
            token = int(np.array(mx.argmax(logits)))
            yield token, np.array(logits)
            ids = [token]


if __name__ == "__main__":
    serve(Mlx)
