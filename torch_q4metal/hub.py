"""How a model arrives: from a folder, or from the Hugging Face Hub into its usual cache.

``resolve_model`` turns what a user typed into a folder with all the files. Downloads go on where
the last run was cut off, are checked against their SHA-256, and only complete ones count.

huggingface_hub keeps the cache, the token and offline mode, and brings the small files. The large
ones are fetched by hub_download.py, into the place where ``snapshot_download`` then finds them.
"""

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HubError
from .hub_download import Download, bytes_here, in_words

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

# huggingface_hub takes half a second to import: only functions that talk to the hub do.

logger = logging.getLogger(__name__)

WANTED = [
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]
_SHARD = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})(\.safetensors)")


def resolve_model(
    path_or_id: str | os.PathLike[str],
    revision: str | None = None,
    offline: bool = False,
    *,
    report: Callable[[str], None] | None = None,
) -> Path:
    """The folder of a model: ``path_or_id`` itself, or the snapshot of that id in the hub's cache.

    Before a download ``report`` gets "ID: N files, X GB to download ..." (default: logged as
    INFO); progress is shown on stderr where that is a terminal. ``offline``, like HF_HUB_OFFLINE,
    takes what is in the cache. An unreachable hub is no error where the cache has all.

    Raises HubError: no such folder or id or revision, no access, no space, no connection, and
    what is not in the cache when offline.
    """
    text = os.fspath(path_or_id)
    path = Path(text).expanduser()
    if text and path.is_dir():
        if revision is not None:
            logger.warning("%s is a folder: the revision %s has no meaning for it", path, revision)
        return path
    _check_is_id(text, path)
    from huggingface_hub import is_offline_mode

    if offline or is_offline_mode():
        return _from_cache(text, revision)
    try:
        return _from_hub(text, revision, report or logger.info)
    except HubError:
        raise
    except Exception as error:
        sentence = _sentence(error, text, revision)
        if sentence is None:
            raise
        raise HubError(sentence) from error


def _check_is_id(text: str, path: Path) -> None:
    if path.is_file():
        if path.suffix == ".gguf":
            raise HubError(
                f"{text} is a GGUF file: turn it into a checkpoint with "
                f"`python -m torch_q4metal.convert {text} FOLDER` and give that folder."
            )
        raise HubError(f"{text} is a file: give the folder that holds the checkpoint.")
    if text.startswith(("/", ".", "~")) or text.count("/") > 1 or text.endswith(os.sep):
        raise HubError(f"There is no folder {text}.")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        raise HubError(
            f"{text!r} is neither a folder nor a model id such as "
            "mlx-community/Qwen2.5-0.5B-Instruct-4bit."
        ) from None


def _from_cache(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    cache = constants.HF_HUB_CACHE
    try:
        folder = Path(
            snapshot_download(
                repo_id, revision=revision, local_files_only=True, allow_patterns=WANTED
            )
        )
        if _is_whole(folder):
            return folder
    except LocalEntryNotFoundError as error:
        blobs = Path(cache) / repo_folder_name(repo_id=repo_id, repo_type="model") / "blobs"
        begun = isinstance(error, IncompleteSnapshotError) or any(blobs.glob("*.incomplete"))
        if not begun:
            raise HubError(
                f"{_named(repo_id, revision)} is not in the cache {cache}: run once without "
                "--offline and HF_HUB_OFFLINE to download it."
            ) from None
    raise HubError(
        f"{_named(repo_id, revision)} is only partly in the cache {cache}: run once without "
        "--offline and HF_HUB_OFFLINE to complete it."
    )


def _is_whole(folder: Path) -> bool:
    """Whether a config and all shards are there. The index may be stale: their names tell."""
    found = {path.name for path in folder.glob("model*.safetensors") if path.is_file()}
    wanted = set(found)
    for name in found:
        if shard := _SHARD.fullmatch(name):
            head, _, middle, count, tail = shard.groups()
            numbers = range(1, int(count) + 1)
            wanted |= {f"{head}{number:05d}{middle}{count}{tail}" for number in numbers}
    return bool(found) and found == wanted and (folder / "config.json").is_file()


def _from_hub(repo_id: str, revision: str | None, report: Callable[[str], None]) -> Path:
    from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    resolved = api.resolve_revision(repo_id, revision=revision)
    storage = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
    snapshot = storage / "snapshots" / resolved.resolved
    try:
        listed: Iterable[Any] = get_cached_repo_tree(repo_id, revision=resolved)
        if not _missing(listed, snapshot):
            return snapshot
    except CachedRepoTreeNotFoundError:
        pass
    listed = api.list_repo_tree(repo_id, recursive=True, revision=resolved.resolved)
    files = [file for file in listed if isinstance(file, RepoFile)]
    _check_has_weights(repo_id, files)
    missing = _missing(files, snapshot)
    blobs = storage / "blobs"
    large = {
        file.lfs.sha256: file
        for file in missing
        if file.lfs is not None and re.fullmatch("[0-9a-f]{64}", file.lfs.sha256)
    }
    here = sum(bytes_here(blobs, file) for file in large.values())
    left = sum(file.size for file in missing) - here
    if missing:
        already = f" ({in_words(here)} of it are here already)" if here else ""
        report(f"{repo_id}: {len(missing)} files, {in_words(left)} to download{already}")
    _check_space(repo_id, left, Path(constants.HF_HUB_CACHE))
    Download(repo_id, resolved.resolved, blobs).run(list(large.values()), here)
    return Path(
        snapshot_download(
            repo_id, revision=resolved, allow_patterns=WANTED, tqdm_class=_silent_bar()
        )
    )


def _missing(listed: Iterable["RepoFile"], snapshot: Path) -> list["RepoFile"]:
    from huggingface_hub.utils import filter_repo_objects

    wanted = filter_repo_objects(listed, allow_patterns=WANTED, key=lambda file: file.path)
    return [file for file in wanted if not (snapshot / file.path).is_file()]


def _check_has_weights(repo_id: str, files: Iterable["RepoFile"]) -> None:
    names = {file.path for file in files}
    if not any(re.fullmatch(r"model[^/]*\.safetensors", name) for name in names):
        other = next((name for name in sorted(names) if name.endswith((".gguf", ".bin"))), None)
        instead = f", but {other}" if other else ""
        raise HubError(
            f"{repo_id} holds no model*.safetensors{instead}: choose a repository in MLX's format, "
            "such as those of mlx-community."
        )


def _check_space(repo_id: str, needed: int, cache: Path) -> None:
    folder = cache.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise HubError(
            f"{repo_id} needs {in_words(needed)} more in {cache}, where {in_words(free)} are free: "
            "make space, or set HF_HUB_CACHE to a folder on a larger disk."
        )


def _silent_bar() -> Any:
    """A progress bar that shows nothing: the small files come after the one that was shown."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))

    return Silent


def _sentence(error: BaseException, repo_id: str, revision: str | None) -> str | None:
    """What went wrong, for the user; None for errors that nobody foresaw."""
    import httpx2
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo_id} is gated: accept its terms at {hub}/{repo_id}, then set HF_TOKEN to a "
            "token of that account."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"There is neither a folder {repo_id} nor a model {_named(repo_id, revision)} on "
            f"{hub}; if the model is private, set HF_TOKEN to a token with access."
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"{hub} refuses access to {repo_id}: set HF_TOKEN to a valid token with access."
        return f"{hub} answered {status} for {repo_id}: try again later."
    if isinstance(error, OSError) and error.errno in _ON_DISK:
        return (
            f"{repo_id} could not be written to {constants.HF_HUB_CACHE}: {_ON_DISK[error.errno]}."
        )
    unreachable = (
        httpx2.TransportError,
        errors.RevisionResolutionError,
        errors.LocalEntryNotFoundError,
    )
    if isinstance(error, unreachable):
        return (
            f"{hub} can't be reached and {_named(repo_id, revision)} is not whole in the cache "
            f"{constants.HF_HUB_CACHE}: check the connection (or HF_ENDPOINT) and run again."
        )
    return None


_NO_SPACE = "the disk is full; make space and run again, it goes on from there"
_ON_DISK = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: "the disk quota is used up; make space and run again, it goes on from there",
    errno.EFBIG: "its file system takes no files of that size; set HF_HUB_CACHE to another disk",
    errno.EACCES: "permission denied; set HF_HUB_CACHE to a folder of yours",
    errno.EPERM: "permission denied; set HF_HUB_CACHE to a folder of yours",
    errno.EROFS: "its disk is read-only; set HF_HUB_CACHE to another one",
}


def _named(repo_id: str, revision: str | None) -> str:
    return repo_id if revision is None else f"{repo_id} (revision {revision})"
