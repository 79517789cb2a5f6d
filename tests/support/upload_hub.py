"""The test Hub with the API for uploads by the real client: login, new repositories, LFS and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support import hub
from tests.support.hub import Hub

LFS = re.compile(rf"{hub.REPOSITORY}\.git/info/lfs/objects/batch")
PREUPLOAD = re.compile(rf"/api/models{hub.REPOSITORY}/preupload/[^/]+")
COMMIT = re.compile(rf"/api/models{hub.REPOSITORY}/commit/(?P<revision>[^/]+)")
BLOB = re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})")


class UploadHub(Hub):
    """The Hub with one user, ``alice``, in the organization ``org``; her token may write unless ``role`` is read."""

    def __init__(self, root: Path, *, role: str = "write", refuse: str = "", **options: Any) -> None:
        self.role, self.refuse = role, refuse
        """Start the Hub; ``refuse`` is the request (create, commit or lfs) that fails."""
        self.blobs: dict[str, bytes] = {}
        super().__init__(root, **options)
        self._server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": self})

    def files(self, repository: str) -> dict[str, bytes]:
        """Return the files on ``main`` of a repository."""
        commit = self.commit_of(repository, "main")
        assert commit is not None, f"{repository} has no main"
        directory = self.root / repository / "commits" / commit
        return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class _Handler(hub._Handler):
    hub: UploadHub

    def do_GET(self) -> None:
        if urlsplit(self.path).path != "/api/whoami-v2":
            return super().do_GET()
        if self.headers["Authorization"] != f"Bearer {self.hub.token}":
            return self._refuse(HTTPStatus.UNAUTHORIZED, "", "Invalid username or password.")
        return self._answer(
            {"name": "alice", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": self.hub.role}}}
        )

    def do_POST(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.headers["Authorization"] != f"Bearer {self.hub.token}":
            return self._refuse(HTTPStatus.UNAUTHORIZED, "", "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if PREUPLOAD.fullmatch(path):
            return self._preupload(json.loads(body))
        if LFS.fullmatch(path):
            return self._lfs_batch(json.loads(body))
        if match := COMMIT.fullmatch(path):
            return self._commit(match["repository"], match["revision"], body)
        return self._refuse(HTTPStatus.NOT_FOUND, "", "no such endpoint")

    def do_PUT(self) -> None:
        body = self._body()
        match = BLOB.fullmatch(urlsplit(self.path).path)
        if match is None or self.hub.refuse == "lfs" or hashlib.sha256(body).hexdigest() != match["oid"]:
            return self._refuse(HTTPStatus.BAD_REQUEST, "", "the storage would not take it")
        self.hub.blobs[match["oid"]] = body
        return self._answer({})

    def _create(self, wanted: dict[str, Any]) -> None:
        repository = f"{wanted['organization']}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repository}", "name": repository}
        if self.hub.refuse == "create":
            return self._refuse(HTTPStatus.FORBIDDEN, "", "You don't have the rights to create a model here")
        if (self.hub.root / repository).is_dir():
            return self._answer({**answer, "error": "You already created this model repo"}, HTTPStatus.CONFLICT)
        self.hub.publish(repository, {".gitattributes": b"*.safetensors filter=lfs\n"}, "main")
        if wanted.get("private") or wanted.get("visibility") == "private":  # before huggingface_hub 1.0, and since
            self.hub.private = [*self.hub.private, repository]
        return self._answer(answer)

    def _preupload(self, wanted: dict[str, Any]) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in wanted["files"]
        ]
        self._answer({"files": files})

    def _lfs_batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {**object_, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{object_['oid']}", "header": {}}}}
            for object_ in wanted["objects"]
        ]
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, repository: str, revision: str, body: bytes) -> None:
        if self.hub.refuse == "commit":
            return self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "", "down for maintenance")
        files = self.hub.files(repository)
        for line in body.splitlines():
            value = (operation := json.loads(line))["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.publish(repository, files, revision)
        return self._answer(
            {"commitOid": commit, "commitUrl": f"{self.hub.url}/{repository}/commit/{commit}", "success": True}
        )

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _refuse(self, status: HTTPStatus, code: str, message: str, commit: str = "") -> None:
        if self.command in ("GET", "HEAD"):
            return super()._refuse(status, code, message, commit)
        return self._answer({"error": message}, status)

    def _answer(self, content: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
