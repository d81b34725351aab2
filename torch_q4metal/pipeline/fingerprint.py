"""Whether two ranks hold the same checkpoint, told by little: no tensor is read as a whole.

Rank 0 sends its facts with the first control message; every other rank compares its own, so that
what travels does not grow with the ranks.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from typing import Any

from ..checkpoint import Checkpoint, TensorInfo
from ..errors import PipelineError
from ..safetensors_header import DTYPE_NAMES

_SAMPLES, _SAMPLE_BYTES = 4, 16  # 64 bytes of each tensor
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def facts_of(checkpoint: Checkpoint) -> str:
    """The config, the tokenizer's hash, each tensor's header and sample: for ``difference``."""
    facts = {
        "config": checkpoint.config.raw,
        "tokenizer": _tokenizer(checkpoint),
        "tensors": {name: _tensor(info) for name, info in checkpoint.tensors.items()},
    }
    return base64.b85encode(zlib.compress(json.dumps(facts).encode())).decode()


def difference(ours: str, theirs: str) -> tuple[str, Any, Any] | None:
    """(what, its value in ``ours``, in ``theirs``) of the first fact that differs, or None.

    Tensors that only one of them holds are no difference: a rank needs only its own layers.
    """
    a, b = _unpacked(ours), _unpacked(theirs)
    for key in sorted(a["config"].keys() | b["config"].keys()):
        pair = a["config"].get(key), b["config"].get(key)
        if pair[0] != pair[1] and not key.startswith("_"):
            return f"{key} in config.json", *pair
    if a["tokenizer"] and b["tokenizer"] and a["tokenizer"] != b["tokenizer"]:
        return "tokenizer (its SHA-256)", a["tokenizer"], b["tokenizer"]
    for name in sorted(a["tensors"].keys() & b["tensors"].keys()):
        (head, sample), (other_head, other_sample) = a["tensors"][name], b["tensors"][name]
        if head != other_head:
            return f"tensor {name}", head, other_head
        if sample != other_sample:
            return f"content of tensor {name} (hash of 64 bytes)", sample, other_sample
    return None


def require_same(first_host: str, found: tuple[str, Any, Any] | None) -> None:
    """Raises PipelineError for a ``difference`` of rank 0's facts and this rank's."""
    if found is not None:
        what, theirs, ours = found
        raise PipelineError(
            f"another {what} than rank 0 on {first_host}: {ours}, not {theirs}; use the same on "
            "every machine."
        )


def _unpacked(facts: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(zlib.decompress(base64.b85decode(facts)))
    return found


def _tokenizer(checkpoint: Checkpoint) -> str | None:
    for name in _TOKENIZERS:
        if (file := checkpoint.path / name).is_file():
            with file.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    return None


def _tensor(info: TensorInfo) -> tuple[str, str]:
    digest = hashlib.blake2b(digest_size=6)
    with info.file.open("rb") as stream:
        for i in range(_SAMPLES):
            stream.seek(info.begin + max(0, info.nbytes - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(stream.read(min(_SAMPLE_BYTES, info.nbytes)))
    return f"{DTYPE_NAMES[info.dtype]} {list(info.shape)}", digest.hexdigest()
