"""The identity of a run in W&B: its id, name, group, tags and config."""

from __future__ import annotations

import os
import secrets
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import to_plain
from qwen_cl.config.wandb_names import LONGEST_NAME, LONGEST_TAG
from qwen_cl.runs.folder import RunFolder

SWEEP = "QWEN_CL_SWEEP"
"""The environment variable with the sweep's folder, set for its trials."""
TRIAL_NAME = "QWEN_CL_TRIAL_NAME"
"""The environment variable with the trial's name."""
FACTS = (
    "model_source",
    "model_commit",
    "model_fingerprint",
    "model_adapter",
    "model_adapter_sha256",
    "data_sha256",
    "tokenizer_hash",
    "trainable_parameters",
    "git_commit",
    "versions",
    "device",
)
"""The fields of status.json that are logged with the config."""
ANY_MODEL = ("hub", "local")
"""The choices of the group model that do not name a model."""


@dataclass(frozen=True, slots=True)
class WandbIdentity:
    """The arguments of ``wandb.init`` that identify a run."""

    id: str
    """Run id; kept when the run is resumed, so that its curves continue."""
    rewind_to: int | None
    """The step that the run resumes from, if W&B may have later ones; None for a new run."""
    name: str
    group: str | None
    """Name of the sweep's folder; None outside a sweep."""
    job_type: str
    tags: list[str]
    config: dict[str, Any]
    directory: Path
    """The folder of ``wandb/``: the sweep's, so that one command shows all its runs, or the run's own."""


def identify(config: RunConfig, folder: RunFolder) -> WandbIdentity:
    """Return the identity of the run in ``folder``."""
    plain = to_plain(config)
    choices = _choices(folder, plain)
    sweep = Path(os.environ[SWEEP]) if os.environ.get(SWEEP) else None
    status = folder.status()
    return WandbIdentity(
        id=status.wandb.id or secrets.token_hex(5),
        rewind_to=status.step if status.resume_from and status.wandb.url else None,
        name=os.environ.get(TRIAL_NAME, "")[:LONGEST_NAME] or config.name or f"{choices['task']}-{choices['peft']}",
        group=sweep.name[:LONGEST_NAME] if sweep else None,
        job_type=choices["task"],
        tags=_tags(config, choices),
        config={**_shareable(plain), "facts": {name: getattr(status, name) for name in FACTS}},
        directory=sweep or folder.directory,
    )


def sync_command(sweep: Path) -> str | None:
    """Return the command that uploads every trial that was logged offline; None without such a trial."""
    return (
        f"wandb sync {shlex.quote(str(sweep))}/wandb/offline-run-*" if any(sweep.glob("wandb/offline-run-*")) else None
    )


def _choices(folder: RunFolder, plain: dict[str, Any]) -> dict[str, str]:
    """Return the choice of each config group; for a config that Hydra did not compose, its type."""
    kinds = {group: plain[group].get("type", "") for group in ("task", "peft", "data", "model")}
    recorded = folder.directory / ".hydra" / "hydra.yaml"
    chosen = OmegaConf.select(OmegaConf.load(recorded), "hydra.runtime.choices") if recorded.is_file() else None
    return {group: str((chosen or {}).get(group) or kind) for group, kind in kinds.items()}


def _tags(config: RunConfig, choices: dict[str, str]) -> list[str]:
    model = choices["model"]
    if model in (*ANY_MODEL, "model"):
        model = config.model.source.rstrip("/").rpartition("/")[2].partition("@")[0]
    tags = [model, choices["peft"], choices["data"], *config.wandb.tags]
    return list(dict.fromkeys(tag[:LONGEST_TAG] for tag in tags))


def _shareable(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the config without ``cluster.setup``, as the user's shell commands may contain passwords."""
    cluster = {name: value for name, value in plain["cluster"].items() if name != "setup"}
    return {**plain, "cluster": cluster}
