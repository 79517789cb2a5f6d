"""A small Hugging Face Hub on 127.0.0.1, for the real huggingface_hub client.

The tree it serves: ``root/ORG/NAME/commits/<40-hex commit>/FILES``, and ``root/ORG/NAME/refs/<branch or tag>``, which
holds a commit. To serve more, subclass ``_Handler`` and name it in a subclass of ``Hub``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = r"/(?P<repository>[^/]+/[^/]+)"
API = re.compile(rf"/api/models{REPOSITORY}(?:/(?P<kind>revision|tree)/(?P<revision>[^/]+))?")
FILE = re.compile(rf"{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
RANGE = re.compile(r"bytes=(\d+)-")
LICENSE = re.compile(rb"^license: (\S+)$", re.MULTILINE)
LFS_OVER = 1024
"""Bytes above which a file is in LFS, as the weights of a real repository are."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    authorization: str | None
    range: str | None = None


class Fault(Enum):
    """The faults of one response; ``Hub.inject`` gives their number."""

    cut = "the connection ends after so many bytes of the file"
    corrupt = "the byte at that place is another one"
    status = "an HTTP status instead of the answer"
    stall = "silence after so many bytes of the file, until the client goes away"
    disabled = "the Hub has taken the repository down"
    wait = "nothing is sent before the API was asked so many times in all"
    html = "a page of HTML, as a captive portal sends"


class Hub:
    """The Hub, which serves from its construction until ``stop`` or the end of its context.

    Without ``token``, a private repository is not found, and a gated one returns its metadata but not its files.
    """

    handler_class: type[_Handler]

    def __init__(
        self, root: Path, *, private: Collection[str] = (), gated: Collection[str] = (), token: str = "hf_secret"
    ) -> None:
        self.root, self.private, self.gated, self.token = root, private, gated, token
        self.requests: list[Request] = []
        self.faults: dict[str, list[tuple[Fault, int]]] = defaultdict(list)
        self.claimed_sizes: dict[str, int] = {}
        """The false file sizes that the API returns, by name."""
        handler = type("Handler", (self.handler_class,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
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
        """Commit the files, or a copy of the directory, and move the branches or tags there; return the commit."""
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

    def inject(self, where: str, fault: Fault, number: int = 0, *, times: int = 1) -> None:
        """Inject a fault into the next ``times`` GETs of the file of this name, or of the API if ``where`` is "api"."""
        self.faults[where] += [(fault, number)] * times

    def commit_of(self, repository: str, revision: str) -> str | None:
        reference = self.root / repository / "refs" / revision
        commit = reference.read_text(encoding="utf-8") if reference.is_file() else revision
        known = re.fullmatch(r"[0-9a-f]{40}", commit) and (self.root / repository / "commits" / commit).is_dir()
        return commit if known else None

    def gets(self, file: str) -> list[Request]:
        """Return the requests for the content of the file of this name."""
        matches = [(FILE.fullmatch(request.path), request) for request in self.requests if request.method == "GET"]
        return [request for match, request in matches if match and match["file"] == file]

    def wait_for_questions(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while sum(bool(API.fullmatch(request.path)) for request in self.requests) < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def fetched(self) -> set[str]:
        """Return the names of the files whose content was sent."""
        matches = [FILE.fullmatch(request.path) for request in self.requests if request.method == "GET"]
        return {match["file"] for match in matches if match}


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the error of a client that disconnected."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        headers = self.headers
        self.hub.requests.append(Request(self.command, unquote(url.path), headers["Authorization"], headers["Range"]))
        if not (match := API.fullmatch(url.path) or FILE.fullmatch(url.path)):
            return self._refuse(HTTPStatus.NOT_FOUND, "", "no such endpoint")
        parts = {name: unquote(value) for name, value in match.groupdict().items() if value}
        fault = self._next_fault(parts.get("file", "api"))
        if fault and fault[0] is Fault.status:
            return self._refuse(HTTPStatus(fault[1]), "", "injected")
        if fault and fault[0] is Fault.disabled:
            return self._refuse(HTTPStatus.FORBIDDEN, "", "Access to this resource is disabled.")
        if fault and fault[0] is Fault.html:
            return self._send(HTTPStatus.OK, b"<html>Welcome to our hotel</html>", {"Content-Type": "text/html"})
        repository, revision = parts["repository"], parts.get("revision", "main")
        if not self._may_read(repository):
            return None
        commit = self.hub.commit_of(repository, revision)
        if commit is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        directory = self.hub.root / repository / "commits" / commit
        files = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
        if "file" in parts:
            if repository in self.hub.gated and not self._authorized():
                return self._refuse(HTTPStatus.UNAUTHORIZED, "GatedRepo", f"Access to model {repository} is restricted")
            if parts["file"] not in files:
                return self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found", commit)
            return self._send_file(files[parts["file"]].read_bytes(), commit, fault)
        if parts.get("kind") == "tree":
            return self._send(HTTPStatus.OK, json.dumps([self._tree_entry(*file) for file in files.items()]).encode())
        with_sizes = parse_qs(url.query).get("blobs") in (["True"], ["true"])  # as requests and httpx write it
        info = {
            "id": repository,
            "sha": commit,
            "private": repository in self.hub.private,
            "gated": "auto" if repository in self.hub.gated else False,
            "siblings": [self._sibling(*file) if with_sizes else {"rfilename": file[0]} for file in files.items()],
        }
        if "README.md" in files and (found := LICENSE.search(files["README.md"].read_bytes())):
            info["cardData"] = {"license": found[1].decode()}
        return self._send(HTTPStatus.OK, json.dumps(info).encode())

    def _next_fault(self, where: str) -> tuple[Fault, int] | None:
        waiting = self.hub.faults[where]
        return waiting.pop(0) if waiting and self.command == "GET" else None

    def _authorized(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {self.hub.token}"

    def _may_read(self, repository: str) -> bool:
        """Return whether this client may see the repository; if not, the response was sent."""
        if self.headers["Authorization"] and not self._authorized():
            self._refuse(HTTPStatus.UNAUTHORIZED, "", "Invalid credentials in Authorization header")
        elif not (self.hub.root / repository).is_dir() or (repository in self.hub.private and not self._authorized()):
            self._refuse(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Repository not found")
        else:
            return True
        return False

    def _tree_entry(self, name: str, path: Path) -> dict[str, Any]:
        data = path.read_bytes()
        entry = {"type": "file", "path": name, "size": len(data), "oid": git_blob_id(data)}
        if len(data) > LFS_OVER:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _sibling(self, name: str, path: Path) -> dict[str, Any]:
        data = path.read_bytes()
        size = self.hub.claimed_sizes.get(name, len(data))
        sibling = {"rfilename": name, "size": size, "blobId": git_blob_id(data)}
        if len(data) > LFS_OVER:
            sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
        return sibling

    def _send_file(self, data: bytes, commit: str, fault: tuple[Fault, int] | None) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_blob_id(data)}"', "Accept-Ranges": "bytes"}
        if len(data) > LFS_OVER:
            headers["ETag"] = headers["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(data))
        if fault and fault[0] is Fault.wait:
            self.hub.wait_for_questions(fault[1])
        status, body = HTTPStatus.OK, data
        if fault and fault[0] is Fault.corrupt:
            body = body[: fault[1]] + bytes([body[fault[1]] ^ 1]) + body[fault[1] + 1 :]
        if self.headers["Range"] and (asked := RANGE.fullmatch(self.headers["Range"])):
            status, start = HTTPStatus.PARTIAL_CONTENT, int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            body = body[start:]
        if fault and fault[0] in (Fault.cut, Fault.stall):
            self._send(status, body[: fault[1]], {**headers, "Content-Length": str(len(body))})
            self.wfile.flush()
            if fault[0] is Fault.stall:
                self.connection.recv(1)
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        return self._send(status, body, headers)

    def _refuse(self, status: HTTPStatus, code: str, message: str, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: HTTPStatus, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        defaults = {"ETag": f'"{git_blob_id(body)}"', "Content-Length": str(len(body))}
        for name, value in {**defaults, **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


Hub.handler_class = _Handler


def git_blob_id(data: bytes) -> str:
    """Return the blob id of git, which is the Hub's ETag of a file that is not in LFS."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def client_environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a child process that reaches only this Hub, with its own cache and no other token."""
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
