"""A whole run from hf://ORG/NAME: pinned before it starts, recorded everywhere after."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

import pytest

from qwen_cl.config.saved import load_config
from tests.conftest import FEW, launch
from tests.support.hub import Hub, client_environment
from tests.support.models import DEMO_MODEL

pytestmark = pytest.mark.slow

TOKEN = f"hf_{secrets.token_hex(16)}"
"""Not written here: NeMo records the difference of a checkout from its commit, this file's too."""


def test_a_run_from_the_hub_is_pinned_to_a_commit(tmp_path: Path) -> None:
    """Load from a private repository through a mirror into a cache with a relative path."""
    cache = Path(os.path.relpath(tmp_path / "models", Path(__file__).parents[2]))
    with Hub(tmp_path / "hub", private={"org/tiny"}, token=TOKEN) as hub:
        commit = hub.publish("org/tiny", {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir()}, "main")
        done = launch(
            "experiment=smoke",
            *("task.max_steps=1", "task.val_check_interval=1", "task.sample_prompts=0", "retention=none", FEW),
            "model=hub",
            "model.source=hf://org/tiny",
            f"model.endpoint={hub.url}",
            f"model.cache={cache}",
            "wandb.mode=offline",
            directory=tmp_path / "run",
            environment=client_environment("http://127.0.0.1:9", tmp_path / "home", HF_TOKEN=TOKEN),
        )
        hub.requests.clear()
        rendered = launch(
            "model=hub",
            f"model.source=hf://org/tiny@{commit}",
            f"model.cache={cache}",
            *("cluster=slurm", "cluster.devices=1", "cluster.account=a", "cluster.partition=p", "dry_run=true"),
            *("model.offline=true", "model.require_pinned_revision=true"),
            directory=tmp_path / "dry",
            environment=client_environment(hub.url, tmp_path / "home"),
        )
        assert hub.requests == []
    assert done.returncode == 0, done.stderr + done.folder.log.read_text()[-3000:]
    pinned = f"hf://org/tiny@{commit}"
    assert done.folder.status().model_commit == commit
    model = load_config(done.folder.config).model
    assert (model.source, model.cache) == (pinned, str(tmp_path / "models"))
    adapter = json.loads((done.folder.adapter / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/tiny", commit)
    recorded = list(done.folder.checkpoints.glob("*/weights/adapter_metadata.json"))
    assert [json.loads(path.read_text())["model_ckpt_path"] for path in recorded] == [pinned]
    assert [path for path in done.folder.directory.rglob("*") if path.is_file() and holds(path, TOKEN)] == []
    assert TOKEN not in done.stdout + done.stderr
    assert not (tmp_path / "home" / "hub").exists()
    assert rendered.returncode == 0, rendered.stderr
    assert f"export HF_HUB_CACHE={tmp_path / 'models'}\n" in rendered.stdout


def holds(path: Path, text: str) -> bool:
    return text.encode() in path.read_bytes()
