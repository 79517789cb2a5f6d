"""A whole run from hf://ORG/NAME: pinned before it starts, recorded everywhere after."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import launch
from tests.hub import Hub, client_environment
from tests.models import DEMO_MODEL


def test_a_run_from_the_hub_is_pinned_to_a_commit(tmp_path: Path) -> None:
    with Hub(tmp_path / "hub") as hub:
        commit = hub.publish("org/tiny", {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir()}, "main")
        done = launch(
            "experiment=smoke",
            "model=hub",
            "model.source=hf://org/tiny",
            "wandb.mode=disabled",
            directory=tmp_path / "run",
            environment=client_environment(hub.url, tmp_path / "home"),
        )
    assert done.returncode == 0, done.stderr + done.folder.log.read_text()[-3000:]
    pinned = f"hf://org/tiny@{commit}"
    assert done.folder.status()["model_commit"] == commit
    assert f"source: {pinned}" in done.folder.config.read_text()
    adapter = json.loads((done.folder.adapter / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/tiny", commit)
    recorded = list(done.folder.checkpoints.glob("*/weights/adapter_metadata.json"))
    assert [json.loads(path.read_text())["model_ckpt_path"] for path in recorded] == [pinned]
