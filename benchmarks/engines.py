"""Which engines can be compared, and the handle of a worker process that runs one."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import python_of

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class EngineKind:
    """One row of a comparison.

    ``environment``  of peers.py, None for this interpreter
    ``format``       of models.py
    ``largest_gap``  how far behind the exact first choice a token may be, in standard deviations
    """

    name: str
    title: str
    environment: str | None
    worker: str
    format: str
    largest_gap: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        if self.environment is None:
            return Path(sys.executable)
        return python_of(self.environment)

    @property
    def is_ours(self) -> bool:
        return self.worker == "worker_ours.py"


# A wrong kernel is 4 away; seen were 0.000 in fast and up to 0.05 with 8-bit activations.
FAST, INT8 = 0.02, 0.25


def _ours(name: str, title: str, gap: float = FAST, **options: Any) -> EngineKind:
    return EngineKind(name, title, None, "worker_ours.py", "mlx", gap, options)


def _llama(name: str, title: str, environment: str, kind: str) -> EngineKind:
    title = f"{title} {kind.upper()}"
    return EngineKind(name, title, environment, "worker_llama_cpp.py", kind, INT8)


def _openvino(name: str, title: str, **properties: str) -> EngineKind:
    options = {"properties": properties}
    return EngineKind(name, title, "openvino", "worker_openvino.py", "openvino", INT8, options)


ENGINES = {
    kind.name: kind
    for kind in (
        _ours("ours", "torch_q4metal"),
        _ours("ours-int8", "torch_q4metal int8", INT8, precision="int8"),
        _ours("ours-exact", "torch_q4metal exact", precision="exact"),
        _ours("ours-eager", "torch_q4metal eager", eager=True),
        _llama("llama-q4_0", "llama.cpp", "llama_cpp", "q4_0"),
        _llama("llama-q4_1", "llama.cpp", "llama_cpp", "q4_1"),
        _llama("llama-avx2-q4_0", "llama.cpp AVX2", "llama_cpp_avx2", "q4_0"),
        _llama("llama-avx2-q4_1", "llama.cpp AVX2", "llama_cpp_avx2", "q4_1"),
        _llama("llama-avx512-q4_0", "llama.cpp AVX-512", "llama_cpp_avx512", "q4_0"),
        _llama("llama-avx512-q4_1", "llama.cpp AVX-512", "llama_cpp_avx512", "q4_1"),
        _openvino("openvino", "OpenVINO int4"),
        _openvino("openvino-f32", "OpenVINO int4 f32", INFERENCE_PRECISION_HINT="f32"),
        _openvino(
            "openvino-f32-dq64", "OpenVINO int4 f32 dq64",
            INFERENCE_PRECISION_HINT="f32", DYNAMIC_QUANTIZATION_GROUP_SIZE="64",
        ),
        EngineKind("mlx", "MLX CPU", None, "worker_mlx.py", "mlx", INT8),
    )
}  # fmt: skip
REFERENCE = ENGINES["ours-exact"]


class Worker:
    """A worker process. ``ask`` sends a command and waits for the answer."""

    def __init__(
        self, kind: EngineKind, cores: list[int] | None, environment: dict[str, str] | None = None
    ) -> None:
        self.kind = kind
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process)
        self._process = subprocess.Popen(
            [str(kind.python), str(HERE / kind.worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        if cores is not None:  # before it has made any thread: they inherit it
            os.sched_setaffinity(self._process.pid, cores)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Raises RuntimeError, with the end of what the worker wrote, if it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            tail = "".join(self._log.readlines()[-15:])
            raise RuntimeError(f"{self.kind.title} ended with {code} while asked to {do}:\n{tail}")
        return json.loads(line)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def settle() -> None:
    """Lets the idle threads of the engine before fall asleep: OpenMP's spin for a while."""
    time.sleep(0.3)
