"""Large files from the Hugging Face Hub, each from where the last attempt ended.

huggingface_hub 2.4 throws away what it has of a file when it is interrupted, be it 4 GB. So here
a file grows at ``blobs/<SHA-256>.incomplete`` in the hub's own cache, under the hub's own lock;
once its checksum is right it takes the blob's name, which is how the hub recognises it.
"""

import hashlib
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HubError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile

logger = logging.getLogger(__name__)

CHUNK = 1 << 20  # bytes; what a cut connection or Ctrl-C can lose
_WORKERS = 4  # files at a time
_PAUSES = (1, 2, 4)  # seconds before each new attempt that brought nothing


def bytes_here(blobs: Path, file: "RepoFile") -> int:
    """Bytes of ``file`` that are in the cache already, whole or in part."""
    assert file.lfs is not None
    if (blobs / file.lfs.sha256).is_file():
        return file.size
    partial = _partial(blobs, file)
    return min(partial.stat().st_size, file.size) if partial.is_file() else 0


def _partial(blobs: Path, file: "RepoFile") -> Path:
    assert file.lfs is not None
    return blobs / f"{file.lfs.sha256}.incomplete"  # `hf cache prune` knows files named so


class _StoppedError(Exception):
    """Another file's download failed, or the user pressed Ctrl-C."""


class Download:
    """Fetches large files into the blobs of a repository's cache, each under its SHA-256."""

    def __init__(self, repo_id: str, commit: str, blobs: Path) -> None:
        self._repo_id, self._commit, self._blobs = repo_id, commit, blobs
        self._stop = threading.Event()

    def run(self, files: list["RepoFile"], here: int) -> None:
        """Fetch ``files``, of which ``here`` bytes are there; the first error stops all."""
        if not files:
            return
        from huggingface_hub.utils import tqdm

        self._blobs.mkdir(parents=True, exist_ok=True)
        # disable=None shows the bar on a terminal only.
        hidden = None if logger.isEnabledFor(logging.WARNING) else True
        bar = tqdm(
            total=sum(file.size for file in files),
            initial=here,
            unit="B",
            unit_scale=True,
            desc=self._repo_id,
            disable=hidden,
        )
        with bar, ThreadPoolExecutor(_WORKERS) as workers:
            try:  # around the start of the first workers too: Ctrl-C may come that soon
                for task in as_completed([workers.submit(self._one, f, bar) for f in files]):
                    task.result()
            except BaseException:
                self._stop.set()
                workers.shutdown(wait=False, cancel_futures=True)
                raise

    def _one(self, file: "RepoFile", bar: Any) -> None:
        from huggingface_hub.utils import WeakFileLock

        assert file.lfs is not None
        blob, partial = self._blobs / file.lfs.sha256, _partial(self._blobs, file)
        # The lock that huggingface_hub takes for the same file.
        locks = self._blobs.parent.parent / ".locks" / self._blobs.parent.name
        locks.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(locks / f"{blob.name}.lock"):
            if blob.exists():
                return
            self._fetch(file, partial, bar)
            with partial.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != blob.name:
                partial.unlink()
                raise HubError(
                    f"{file.path} of {self._repo_id} arrived damaged and was removed: run the "
                    "same command again."
                )
            os.replace(partial, blob)

    def _fetch(self, file: "RepoFile", partial: Path, bar: Any) -> None:
        """Append to ``partial`` until it has all bytes, over as many connections as it takes."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError

        failures = 0
        with partial.open("ab") as out:
            if out.tell() > file.size:
                out.truncate(0)
            while (start := out.seek(0, os.SEEK_END)) < file.size:
                try:
                    self._get(file, start, out, bar)
                except (httpx2.TransportError, HfHubHTTPError) as error:
                    if isinstance(error, HfHubHTTPError) and not _is_passing(error):
                        raise
                    end = out.seek(0, os.SEEK_END)
                    failures = 0 if end > start else failures + 1
                    if failures > len(_PAUSES):
                        raise HubError(
                            f"The connection broke at {in_words(end)} of {in_words(file.size)} of "
                            f"{file.path}: run the same command again, it goes on from there."
                        ) from error
                    if failures and self._stop.wait(_PAUSES[failures - 1]):
                        raise _StoppedError from None

    def _get(self, file: "RepoFile", start: int, out: Any, bar: Any) -> None:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self._repo_id, file.path, revision=self._commit)
        headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
        with get_session().stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:  # a server that knows no ranges sends all of it
                out.truncate(0)
                bar.update(-start)
            for chunk in response.iter_bytes(CHUNK):
                if self._stop.is_set():
                    raise _StoppedError
                if out.tell() >= file.size:
                    break  # more than there is: the checksum will say so
                out.write(chunk)
                bar.update(len(chunk))
        out.flush()


def _is_passing(error: "HfHubHTTPError") -> bool:
    """Whether the same request may work in a moment."""
    status = error.response.status_code
    return status == 429 or status >= 500


def in_words(count: int) -> str:
    """A number of bytes for people: "4.30 GB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1e3:.1f} kB"
