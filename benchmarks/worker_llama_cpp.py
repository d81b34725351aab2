"""llama.cpp through the raw API of llama-cpp-python; its defaults: repacked weights, f16 cache.

The prompt is one ``llama_decode`` of a batch, then come single tokens; only the last position gets
logits. Runs in the environment ``llama_cpp`` (or a variant) of peers.py.
"""

import ctypes
from collections.abc import Iterator
from typing import Any

import llama_cpp as llama
import numpy as np
from worker import Engine, RowsStep, Step, serve

ROWS = 8


class LlamaCpp(Engine):
    version = llama.__version__

    def __init__(self, path: str, threads: int, context: int, rows: bool = False) -> None:
        """``rows``: room for 8 texts of ``context`` tokens."""
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(
            path.encode(), llama.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        parameters = llama.llama_context_default_params()
        texts = ROWS if rows else 1
        parameters.n_ctx = texts * -(-context // 256) * 256
        parameters.n_seq_max = texts
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(512, 0, 1)

    def details(self) -> dict[str, Any]:
        parts = llama.llama_print_system_info().decode().replace(":", "|").split("|")
        return {
            "kernels": " ".join(part.split("=")[0].strip() for part in parts if "= 1" in part),
            "weight_bytes": llama.llama_model_size(self._model),
        }

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Entries are (token, position, sequence, whether logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        code = llama.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def _logits(self, index: int) -> np.ndarray:
        pointer = llama.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self._vocab,)
        )

    def _prefill(self, prompt: list[int], sequence: int) -> np.ndarray:
        for begin in range(0, len(prompt), 512):
            part = prompt[begin : begin + 512]
            self._decode([
                (token, begin + i, sequence, begin + i == len(prompt) - 1)
                for i, token in enumerate(part)
            ])  # fmt: skip
        return self._logits(-1)

    def generate(self, prompt: list[int], tokens: int) -> Iterator[Step]:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
        logits = self._prefill(prompt, 0)
        for position in range(len(prompt), len(prompt) + tokens):
            token = int(logits.argmax())
            yield token, logits
            if position < len(prompt) + tokens - 1:
                self._decode([(token, position, 0, True)])
                logits = self._logits(-1)

    def generate_rows(self, prompts: list[list[int]], tokens: int) -> Iterator[RowsStep]:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
        drawn = [int(self._prefill(prompt, i).argmax()) for i, prompt in enumerate(prompts)]
        logits = self._logits(-1)
        for step in range(tokens):
            yield drawn, logits
            if step < tokens - 1:
                self._decode([
                    (token, len(prompts[i]) + step, i, True) for i, token in enumerate(drawn)
                ])  # fmt: skip
                rows = [self._logits(i) for i in range(len(prompts))]
                logits, drawn = rows[-1], [int(row.argmax()) for row in rows]


if __name__ == "__main__":
    serve(LlamaCpp)
