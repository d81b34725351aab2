"""A folder that appears under its name only when it is complete.

What is written goes to a hidden sibling that is renamed at the end. Any failure, Ctrl-C included,
removes it, and leaves whatever stood at the target as it was.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError


@contextmanager
def output_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of ``target`` to write into; rename it to ``target`` afterwards.

    With ``force`` an existing ``target`` is replaced, but only if it is a model folder (it holds a
    ``config.json``) or empty. Raises CheckpointError if the target exists or can't be written; an
    OSError of the block itself, a full disk for example, becomes one too.
    """
    target = Path(os.path.abspath(target))
    check_target(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(".partial", f".{target.name}.", target.parent))
        partial.chmod(0o777 & ~_umask())  # mkdtemp hides its folders from everybody else
    except OSError as error:
        raise _write_error(target, error) from error
    try:
        yield partial
        check_target(target, force=force)
        _replace(partial, target)
    except OSError as error:
        raise _write_error(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: Path, *, force: bool) -> None:
    """Raise CheckpointError unless ``target`` is free or ``force`` may replace it."""
    if not os.path.lexists(target):
        return
    if not force:
        raise CheckpointError(f"{target} exists already: name another folder or give --force.")
    if not target.is_dir() or target.is_symlink():
        raise CheckpointError(f"{target} is no folder, and --force replaces only model folders.")
    if any(target.iterdir()) and not (target / "config.json").is_file():
        raise CheckpointError(
            f"{target} holds no config.json, and --force replaces only model folders."
        )


def _replace(partial: Path, target: Path) -> None:
    """Rename ``partial`` to ``target``; an old ``target`` is moved aside first and then removed."""
    if not target.exists():
        partial.rename(target)
        return
    aside = Path(tempfile.mkdtemp(".old", f".{target.name}.", target.parent))
    old = target.rename(aside / target.name)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_error(target: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot write {target}: {error.strerror or error}.")
