"""OpenVINO's CPU plugin on the models of openvino_model.py, driven with token ids.

Defaults of the plugin, unless ``properties`` say otherwise: bf16 where the CPU has it, 8-bit
activations where it chooses them, an 8-bit cache. Runs in the environment ``openvino`` of peers.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from worker import Engine, RowsStep, Step, serve

REPORTED = (
    "INFERENCE_PRECISION_HINT",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "KV_CACHE_PRECISION",
    "INFERENCE_NUM_THREADS",
    "ENABLE_CPU_PINNING",
)


class OpenVino(Engine):
    version = ov.__version__.partition("-")[0]

    def __init__(
        self,
        path: str,
        threads: int,
        context: int,
        properties: dict[str, str] | None = None,
        rows: bool = False,
    ) -> None:
        core = ov.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        file = Path(path) / "model.xml"
        self._model = core.compile_model(file, "CPU", {**settings, **(properties or {})})
        self._request = self._model.create_infer_request()
        self._weight_bytes = file.with_suffix(".bin").stat().st_size

    def details(self) -> dict[str, Any]:
        chosen = {name: _plain(self._model.get_property(name)) for name in REPORTED}
        return {"kernels": _kernels(self._model), "properties": chosen}

    def _infer(self, ids: np.ndarray, past: int) -> np.ndarray:
        """Logits [B, V] of the last of ids [B, L]."""
        batch, count = ids.shape
        end = past + count
        result = self._request.infer(
            {
                "input_ids": ids,
                "attention_mask": np.ones((batch, end), np.int64),
                "position_ids": np.broadcast_to(np.arange(past, end), ids.shape).copy(),
                "beam_idx": np.arange(batch, dtype=np.int32),
            },
            share_inputs=True,
            share_outputs=True,
        )
        return result[0][:, -1]

    def generate(self, prompt: list[int], tokens: int) -> Iterator[Step]:
        for drawn, logits in self.generate_rows([prompt], tokens):
            yield drawn[0], logits[0]

    def generate_rows(self, prompts: list[list[int]], tokens: int) -> Iterator[RowsStep]:
        """Prompts must be of one length."""
        self._request.reset_state()
        ids = np.array(prompts, np.int64)
        past = 0
        for _ in range(tokens):
            logits = self._infer(ids, past)
            past += ids.shape[1]
            drawn = logits.argmax(-1)
            ids = drawn.reshape(-1, 1)
            yield drawn.tolist(), logits


def _plain(value: Any) -> str:
    return value.to_string() if isinstance(value, ov.Type) else str(value)


def _kernels(model: ov.CompiledModel) -> str:
    """Which layers were fused, so that a graph which the plugin did not recognise is noticed."""
    counts = dict.fromkeys(("FullyConnected", "ScaledDotProductAttention", "RoPE", "RMS"), 0)
    for node in model.get_runtime_model().get_ops():
        kind = node.get_rt_info()["layerType"].astype(str)
        if kind in counts:
            counts[kind] += 1
    return " ".join(f"{count} {kind}" for kind, count in counts.items())


if __name__ == "__main__":
    serve(OpenVino)
