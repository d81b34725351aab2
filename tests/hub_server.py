"""A stand-in for the Hugging Face Hub on 127.0.0.1: the routes that a download uses, and faults.

Driven through HF_ENDPOINT. Files of 1 kB and more are "LFS" files (named by SHA-256, with ranges);
smaller ones are git blobs. ``log`` holds every request; ``served`` counts the bytes of each file.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_FROM = 1000
_BLOCK = 64 * 1024


@dataclass
class Repo:
    """One revision of a repository and what goes wrong with it."""

    files: dict[str, bytes]
    commit: str = "a" * 40
    revisions: tuple[str, ...] = ("main",)
    token: str | None = None  # asked for; gated without it
    cut_at: dict[str, int] = field(default_factory=dict)  # path: bytes, then the line goes dead
    cuts: int = 1  # how many answers are cut
    hang: bool = False  # cut by silence instead of a closed connection
    ranges: bool = True
    failures: int = 0  # answers of 503 before each file
    damage: bool = False  # one bit of each large file is wrong


class HubServer(ThreadingHTTPServer):
    """``with HubServer({"org/name": Repo(...)}) as hub:`` listens at ``hub.url``."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Repo]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.log: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.served: dict[str, int] = {}
        self.reached_cut = threading.Event()
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "HubServer":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Answer no more; open connections end."""
        if not self.closing.is_set():
            self.closing.set()
            self.shutdown()
            self.server_close()
            self.thread.join()

    def forget(self) -> None:
        """Start counting anew."""
        with self.lock:
            self.log.clear()
            self.served.clear()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed in the middle of an answer are the point of these tests."""


def _etag(data: bytes) -> str:
    if len(data) >= LFS_FROM:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.log.append((self.command, path, self.headers.get("Range")))
        match = re.fullmatch(
            r"/(?:api/models/(?P<api>[^/]+/[^/]+)(?:/revision/(?P<info>.+)|/tree/(?P<tree>[^/]+))?"
            r"|(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+))",
            path,
        )
        if match is None:
            return self._error(404, "RepoNotFound")
        repo = self.server.repos.get(match["api"] or match["id"])
        if repo is None:
            # As the hub does: without a token it doesn't tell "private" from "not there".
            known = self.headers.get("Authorization") is not None
            return self._error(404 if known else 401, "RepoNotFound")
        if repo.token is not None and self.headers.get("Authorization") != f"Bearer {repo.token}":
            return self._error(403, "GatedRepo")
        revision = match["info"] or match["tree"] or match["revision"] or "main"
        if revision != repo.commit and revision not in repo.revisions:
            return self._error(404, "RevisionNotFound")
        if match["tree"]:
            return self._json([_entry(name, data) for name, data in repo.files.items()])
        if match["api"]:
            return self._json({"id": match["api"], "sha": repo.commit, "siblings": []})
        return self._file(repo, match["file"])

    def _error(self, status: int, code: str) -> None:
        self._json({"error": code}, status, {"X-Error-Code": code})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._head(status, {"Content-Length": str(len(body)), **(headers or {})})
        if self.command == "GET":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _file(self, repo: Repo, name: str) -> None:
        data = repo.files.get(name)
        if data is None:
            return self._error(404, "EntryNotFound")
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": repo.commit}
        if self.command == "HEAD":
            return self._head(200, headers | {"Content-Length": str(len(data))})
        with self.server.lock:
            failing = len(data) >= LFS_FROM and repo.failures > 0
            repo.failures -= failing
        if failing:
            return self._error(503, "")
        start, asked = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and repo.ranges:
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        self._head(
            206 if asked and repo.ranges else 200, {**headers, "Content-Length": str(len(body))}
        )
        if repo.damage and len(data) >= LFS_FROM:
            body = body[:-1] + bytes([body[-1] ^ 1])
        return self._send(repo, name, start, body)

    def _send(self, repo: Repo, name: str, start: int, body: bytes) -> None:
        end = len(body)
        with self.server.lock:
            cut = name in repo.cut_at and repo.cuts > 0
            repo.cuts -= cut
        if cut:
            end = max(0, repo.cut_at[name] - start)
        for begin in range(0, end, _BLOCK):
            block = body[begin : min(begin + _BLOCK, end)]
            self.wfile.write(block)
            with self.server.lock:
                self.server.served[name] = self.server.served.get(name, 0) + len(block)
        if cut:
            self.wfile.flush()
            self.server.reached_cut.set()
            if repo.hang:
                self.server.closing.wait()
            self.close_connection = True


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
    if len(data) >= LFS_FROM:
        entry["oid"] = hashlib.sha1(data).hexdigest()
        entry["lfs"] = {"oid": _etag(data), "size": len(data), "pointerSize": 130}
    return entry
