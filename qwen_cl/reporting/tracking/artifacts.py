"""The trained adapter as a W&B artifact, with its provenance."""

from __future__ import annotations

import json
import re
from typing import Any

from qwen_cl.config.wandb import LogAdapter
from qwen_cl.runs.folder import RunFolder

ORIGIN = ("model_source", "model_commit", "model_fingerprint", "model_adapter_sha256", "data_sha256")
"""The fields of status.json with the provenance of the adapter."""


def log_adapter(run: Any, folder: RunFolder, mode: LogAdapter) -> None:
    """Log the adapter of a run, if it has one.

    Base model and data are logged by name, commit and hash; their files are not read.
    """
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
    if not run.offline:  # W&B accepts no input artifacts offline; the metadata has the same facts
        source = _name(origin["model_source"].partition("@")[0])
        run.use_artifact(_described(source, "model", origin))
        if "data_sha256" in origin:  # mock data has none
            run.use_artifact(_described(f"data-{origin['data_sha256'][:12]}", "dataset", origin))


def _described(name: str, kind: str, origin: dict[str, str]) -> Any:
    """Return an artifact that consists of the provenance alone, which determines its version."""
    import wandb

    artifact = wandb.Artifact(name, kind, metadata=origin)
    with artifact.new_file("origin.json", mode="w") as stream:
        json.dump(origin, stream, indent=2)
    return artifact


def _name(source: str) -> str:
    """Return the last two parts of a source, in the characters that W&B accepts in names."""
    last = "-".join(source.removeprefix("hf://").strip("/").split("/")[-2:])
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last)[-100:]
