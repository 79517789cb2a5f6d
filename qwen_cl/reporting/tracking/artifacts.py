"""The trained adapter on W&B, with where it comes from."""

from __future__ import annotations

import json
import re
from typing import Any

from qwen_cl.config.wandb import LogAdapter
from qwen_cl.runs.folder import RunFolder

ORIGIN = ("model_source", "model_commit", "model_fingerprint", "model_adapter_sha256", "data_sha256")
"""Of status.json: what the adapter was made of."""


def log_adapter(run: Any, folder: RunFolder, mode: LogAdapter) -> None:
    """Nothing where there is none. Base and data are told by name, commit and hash. None of their files is read."""
    if mode is LogAdapter.none or not folder.adapter.is_dir():
        return
    import wandb

    status = folder.status()
    origin = {name: value for name in ORIGIN if (value := getattr(status, name))}
    adapter = wandb.Artifact(f"adapter-{run.id}", "model", metadata={**origin, "step": status.step})
    if mode is LogAdapter.upload:
        adapter.add_dir(str(folder.adapter), policy="immutable")  # or W&B copies it first
    else:
        adapter.add_reference(folder.adapter.as_uri())
    run.log_artifact(adapter)
    if not run.offline:  # W&B takes no inputs offline; the metadata says the same
        source = _name(origin["model_source"].partition("@")[0])
        run.use_artifact(_described(source, "model", origin))
        if "data_sha256" in origin:  # random tokens have none
            run.use_artifact(_described(f"data-{origin['data_sha256'][:12]}", "dataset", origin))


def _described(name: str, kind: str, origin: dict[str, str]) -> Any:
    """An artifact of the words alone: its version changes with what they say."""
    import wandb

    artifact = wandb.Artifact(name, kind, metadata=origin)
    with artifact.new_file("origin.json", mode="w") as stream:
        json.dump(origin, stream, indent=2)
    return artifact


def _name(source: str) -> str:
    """W&B takes letters, digits, dashes, underscores and dots; of a path its last two parts say enough."""
    last = "-".join(source.removeprefix("hf://").strip("/").split("/")[-2:])
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last)[-100:]
