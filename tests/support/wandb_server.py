"""A W&B server for tests: it starts a run, accepts its logs, and then fails as requested."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STREAM = "/file_stream"


class WandbServer:
    """The server; ``init`` and ``stream`` are the HTTP status for starting a run and for its records.

    With None it never answers (until it closes), and with 200 the answers are valid.
    """

    def __init__(self, init: int | None = 200, stream: int | None = 200, can_rewind: bool = True) -> None:
        self.init, self.stream, self.can_rewind = init, stream, can_rewind
        self.started: list[dict[str, Any]] = []
        """The variables of the requests that started or changed a run."""
        self.rewound: list[dict[str, Any]] = []
        """The variables of the requests that rewound a run to a step."""
        self.streamed: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        """The variables of the requests that saved a workspace or a report."""
        self.closing = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                is_stream = self.path.endswith(STREAM)
                status = owner.stream if is_stream else owner.init
                if status is None:
                    owner.closing.wait(120)
                    self.close_connection = True
                    return
                self._answer(status, owner.take(is_stream, body) if status == 200 else {})

            do_GET = do_HEAD = do_PUT = do_POST

            def _answer(self, status: int, content: dict[str, Any]) -> None:
                encoded = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(encoded)))
                self.end_headers()
                self.wfile.write(encoded)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def take(self, is_stream: bool, body: bytes) -> dict[str, Any]:
        if is_stream:
            self.streamed.append(json.loads(body))
            return {}
        try:
            asked = json.loads(body)
        except ValueError:  # telemetry
            return {}
        variables = asked.get("variables") or {}
        query = asked.get("query", "")  # uploaded files have none
        if "upsertBucket" in query:
            self.started.append(variables)
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": variables["name"], "displayName": variables["displayName"], "config": None}
            return {"data": {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}}
        if "rewindRun" in query:
            self.rewound.append(variables)
            if not self.can_rewind:
                return {"errors": [{"message": "rewind is not enabled"}]}
            project = {"id": "p", "name": "qwen_cl", "entity": {"id": "e", "name": "me"}}
            lines = {"historyLineCount": 0, "logLineCount": 0, "eventsLineCount": 0}
            run = {"id": "b", "name": variables["runName"], "displayName": "n", "config": "{}", **lines}
            return {"data": {"rewindRun": {"rewoundRun": {**run, "project": project}}}}
        if view := self.answer_of_a_view(query, variables):
            return {"data": view}
        if "viewer" in query:
            return {"data": {"viewer": {"id": "u", "entity": "me", "username": "me", "teams": {"edges": []}}}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def answer_of_a_view(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a query of workspaces and reports."""
        if "upsertView" in query:
            self.views.append(variables)
            project = {"id": "p", "name": "qwen_cl", "entityName": "me"}
            view = {"id": "dmlldw==", "name": "view", "displayName": "view", "project": project, "spec": "{}"}
            return {"upsertView": {"view": view, "inserted": True}}
        if "ProjectInternalId" in query:
            return {"project": {"id": "p", "internalId": "1"}}
        if "GetProjects" in query:
            project = {"id": "p", "name": "qwen_cl", "entityName": "me", "createdAt": ""}
            page = {"endCursor": None, "hasNextPage": False}
            node = {**project, "isBenchmark": False, "user": None}
            return {"models": {"pageInfo": page, "edges": [{"node": node}]}}
        return {}


@contextmanager
def wandb_server(init: int | None = 200, stream: int | None = 200, *, can_rewind: bool = True) -> Iterator[WandbServer]:
    server = WandbServer(init, stream, can_rewind)
    threading.Thread(target=server.server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.server.shutdown()
        server.server.server_close()
