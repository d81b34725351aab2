"""The key that all machines of a cluster share, as a file.

It holds one CURVE secret key (Curve25519) in Z85. A rank that listens has it as its server key, a
rank that connects as its client key; whoever has the file can join, nobody else can.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from ..errors import PipelineError

_COMMENT = "# torch_q4metal cluster: whoever has this key can join. Copy it to your machines only."


@dataclass(frozen=True)
class Key:
    """A CURVE key pair, each half as 40 characters of Z85."""

    public: bytes
    secret: bytes = field(repr=False)


def write_key(path: Path) -> Key:
    """Makes a key and writes it to a new file that only its owner may read.

    Raises PipelineError if the file is there already or cannot be written.
    """
    public, secret = zmq.curve_keypair()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise PipelineError(
            f"{path} exists already; a key is never overwritten, so name another file."
        ) from None
    except OSError as error:
        raise PipelineError(f"{path} cannot be written: {error.strerror}.") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{_COMMENT}\n{secret.decode()}\n")
    return Key(public, secret)


def read_key(path: Path) -> Key:
    """The key in a file. Raises PipelineError if it has none, or if others may read it."""
    try:
        if os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise PipelineError(
                f"other users of this machine may read the key {path}; run: chmod 600 {path}"
            )
        lines = path.read_text().splitlines()
    except OSError as error:
        raise PipelineError(
            f"the key {path} cannot be read: {error.strerror}; make one with "
            "python -m torch_q4metal.cluster keygen, and copy it to every machine."
        ) from None
    except UnicodeDecodeError:
        lines = []
    secret = "".join(line.strip() for line in lines if not line.startswith("# "))
    try:
        return Key(zmq.curve_public(secret.encode("ascii")), secret.encode("ascii"))
    except (ValueError, zmq.ZMQError):
        raise PipelineError(
            f"{path} holds no key; make one with python -m torch_q4metal.cluster keygen."
        ) from None
