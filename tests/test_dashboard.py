"""W&B where its server is away: the run goes on offline and says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

START = """
import sys
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from qwen_cl.config.store import register_schemas
from qwen_cl.dashboard import start_dashboard
from qwen_cl.run_folder import RunFolder

register_schemas()
with initialize_config_dir(sys.argv[1] + "/conf", version_base="1.3"):
    config = OmegaConf.to_object(compose("config"))
logger = start_dashboard(config, RunFolder(sys.argv[2]))
logger.log_metrics({"train/loss": 1.5}, step=1)
import wandb
wandb.finish()
"""


class Broken(BaseHTTPRequestHandler):
    """A server that is there and cannot do anything."""

    def do_POST(self) -> None:
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def broken_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def start(directory: Path, server: str, key: str = "0" * 40) -> dict[str, Any]:
    directory.mkdir(parents=True)
    environment = {"WANDB_API_KEY": key, "WANDB_BASE_URL": server, "WANDB_INIT_TIMEOUT": "4", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", START, str(ROOT), str(directory)],
        cwd=ROOT,
        env={**{name: value for name, value in os.environ.items() if "proxy" not in name.lower()}, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert key not in "".join(path.read_text(errors="replace") for path in directory.rglob("*") if path.is_file())
    return dict(json.loads((directory / "status.json").read_text())["wandb"])


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    status = start(tmp_path / "runs/one", "http://127.0.0.1:9")
    assert status["mode"] == "offline"
    assert status["reason"] == "127.0.0.1:9 does not answer (Connection refused)"
    _check_record(tmp_path / "runs/one", status)


def test_a_server_that_fails(broken_server: str, tmp_path: Path) -> None:
    status = start(tmp_path / "runs/one", broken_server)
    assert status["mode"] == "offline"
    assert status["reason"].startswith("CommError: ")
    _check_record(tmp_path / "runs/one", status)


def _check_record(directory: Path, status: dict[str, Any]) -> None:
    """One record, the one the sync command names, with what was logged in it."""
    found = [path for path in (directory / "wandb").glob("*run-*") if path.is_dir() and not path.is_symlink()]
    assert [f"wandb sync {path}" for path in found] == [status["sync"]]
    shown = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(next(found[0].glob("*.wandb")))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "train/loss" in shown.stdout
