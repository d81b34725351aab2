"""Writes the models that are measured: ``python benchmarks/models.py 0.5b 7b-6``.

Real shapes with random weights, the same weights in every format: MLX 4-bit (group size 64) for
torch_q4metal, GGUF Q4_0 and Q4_1 for llama.cpp, and a folder with u4 weights for OpenVINO. What is
there already is kept. Needed on disk: 0.5b 1.2 GB, 1.5b 3.5 GB, 7b-6 5.5 GB, 7b 17 GB.
"""

import argparse
import subprocess
import time
from pathlib import Path

from peers import python_of, set_up
from shapes import MODELS, SHAPES, SMOLLM2

DEFAULT_FOLDER = Path(__file__).resolve().parent / ".models"
FORMATS = ("mlx", "q4_0", "q4_1", "openvino")


def model_path(folder: Path, model: str, kind: str) -> Path | None:
    """Where a model lies in one format; None for a format that it does not come in.

    SmolLM2 is the built-in model and the Q4_1 file it was converted from, both installed with the
    package; for OpenVINO its weights are quantized anew.
    """
    if model == SMOLLM2 and kind in ("mlx", "q4_0", "q4_1"):
        from torch_q4metal.builtin_model import builtin_gguf, builtin_model

        return {"mlx": builtin_model, "q4_1": builtin_gguf}.get(kind, lambda: None)()
    suffix = ".gguf" if kind in ("q4_0", "q4_1") else ""
    return folder / f"{model}-{kind}{suffix}"


def write_model(folder: Path, model: str, kind: str) -> Path | None:
    """The path of a model, which is written first if it is not there."""
    path = model_path(folder, model, kind)
    if path is None or path.exists():
        return path
    begin = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "mlx":
        from mlx_model import write_mlx

        write_mlx(SHAPES[model], path)
    else:
        mlx = write_model(folder, model, "mlx")
        assert mlx is not None
        if kind == "openvino":
            script = Path(__file__).with_name("openvino_model.py")
            set_up("openvino")
            subprocess.run([python_of("openvino"), script, mlx, path], check=True)
        else:
            from gguf_model import write_gguf

            write_gguf(SHAPES[model], kind, mlx, path)
    print(f"{path}: written in {time.perf_counter() - begin:.1f} s", flush=True)
    return path


def parse_models(text: str) -> list[str]:
    """Names out of a list with commas. Raises ArgumentTypeError for one that is not known."""
    names = text.split(",")
    for name in names:
        if name not in MODELS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(MODELS)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", choices=MODELS, help="which ones")
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=FORMATS, help="in which formats (all)"
    )
    parser.add_argument(
        "--folder", type=Path, default=DEFAULT_FOLDER, help=f"where to ({DEFAULT_FOLDER})"
    )
    options = parser.parse_args()
    for model in options.models:
        for kind in options.formats:
            write_model(options.folder, model, kind)


if __name__ == "__main__":
    main()
