"""A small Hugging Face Hub on 127.0.0.1, for the real huggingface_hub client.

The tree it serves: ``root/ORG/NAME/commits/<40-hex commit>/FILES``, and ``root/ORG/NAME/refs/<branch or tag>``, which
holds a commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY = r"/(?P<repository>[^/]+/[^/]+)"
API = re.compile(rf"/api/models{REPOSITORY}(?:/(?P<kind>revision|tree)/(?P<revision>[^/]+))?")
FILE = re.compile(rf"{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    authorization: str | None


class Hub:
    """Serves from the moment it is made until ``stop`` or the end of its ``with``.

    Without ``token`` a private repository looks absent, and a gated one shows its page but not its files.
    """

    def __init__(
        self, root: Path, *, private: Collection[str] = (), gated: Collection[str] = (), token: str = "hf_secret"
    ) -> None:
        self.root, self.private, self.gated, self.token = root, private, gated, token
        self.requests: list[Request] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def publish(self, repository: str, files: dict[str, bytes] | Path, *references: str) -> str:
        """Commit the files, or a copy of the directory, and move the branches or tags there; returns the commit."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        listing = "".join(f"{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(files.items()))
        commit = hashlib.sha1(f"{repository}\n{listing}".encode()).hexdigest()
        directory = self.root / repository / "commits" / commit
        shutil.rmtree(directory, ignore_errors=True)
        for name, data in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(data)
        for reference in references:
            path = self.root / repository / "refs" / reference
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(commit, encoding="utf-8")
        return commit

    def commit_of(self, repository: str, revision: str) -> str | None:
        reference = self.root / repository / "refs" / revision
        commit = reference.read_text(encoding="utf-8") if reference.is_file() else revision
        known = re.fullmatch(r"[0-9a-f]{40}", commit) and (self.root / repository / "commits" / commit).is_dir()
        return commit if known else None

    def fetched(self) -> set[str]:
        """The names of the files whose content was sent."""
        matches = [FILE.fullmatch(request.path) for request in self.requests if request.method == "GET"]
        return {match["file"] for match in matches if match}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raw = urlsplit(self.path).path
        self.hub.requests.append(Request(self.command, unquote(raw), self.headers["Authorization"]))
        if not (match := API.fullmatch(raw) or FILE.fullmatch(raw)):
            return self._refuse(HTTPStatus.NOT_FOUND, "", "no such endpoint")
        parts = {name: unquote(value) for name, value in match.groupdict().items() if value}
        repository, revision = parts["repository"], parts.get("revision", "main")
        authorized = self.headers["Authorization"] == f"Bearer {self.hub.token}"
        if self.headers["Authorization"] and not authorized:
            return self._refuse(HTTPStatus.UNAUTHORIZED, "", "Invalid credentials in Authorization header")
        if not (self.hub.root / repository).is_dir() or (repository in self.hub.private and not authorized):
            return self._refuse(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Repository not found")
        commit = self.hub.commit_of(repository, revision)
        if commit is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        directory = self.hub.root / repository / "commits" / commit
        files = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
        if "file" in parts:
            if repository in self.hub.gated and not authorized:
                return self._refuse(HTTPStatus.UNAUTHORIZED, "GatedRepo", f"Access to model {repository} is restricted")
            if parts["file"] not in files:
                return self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found", commit)
            return self._send(HTTPStatus.OK, files[parts["file"]].read_bytes(), {"X-Repo-Commit": commit})
        if parts.get("kind") == "tree":
            entries = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path.read_bytes())}
                for name, path in files.items()
            ]
            return self._send(HTTPStatus.OK, json.dumps(entries).encode())
        info = {
            "id": repository,
            "sha": commit,
            "private": repository in self.hub.private,
            "gated": "auto" if repository in self.hub.gated else False,
            "siblings": [{"rfilename": name} for name in files],
        }
        return self._send(HTTPStatus.OK, json.dumps(info).encode())

    def _refuse(self, status: HTTPStatus, code: str, message: str, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: HTTPStatus, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"ETag": f'"{_etag(body)}"', "Content-Length": str(len(body)), **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _etag(data: bytes) -> str:
    """As git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def client_environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """For a child process that must reach this Hub only, with a cache of its own and no token but one given."""
    kept = {name: value for name, value in os.environ.items() if not re.match(r"HF_|HUGGING|(?i:.*_proxy$)", name)}
    ours = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }
    return {**kept, **ours, **more}
