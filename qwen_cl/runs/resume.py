"""Resume an interrupted run: check that it is the same run, choose a valid checkpoint, discard later records.

``python -m qwen_cl.runs.resume RUN_DIRECTORY`` does so where no launcher can: in a batch script, which may run again.
No torch.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.config.fields import Affects, affects
from qwen_cl.config.resume import AutoResumeConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import read_overrides, read_run_config, result_affecting_leaves, to_plain
from qwen_cl.config.store import register_schemas
from qwen_cl.files.atomic import write_text
from qwen_cl.runs.checkpoints import Checkpoint, clear_leftovers, latest_valid_checkpoint
from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.manifest import VerifyProgress
from qwen_cl.runs.status import RunStatus, State, now

FACTS = {
    "data.hash": ("data_sha256", Affects.result),
    "data.bos_token": ("bos_token", Affects.result),
    "model.fingerprint": ("model_fingerprint", Affects.checkpoint),
    "model.tokenizer": ("tokenizer_hash", Affects.checkpoint),
    "model.output_layer": ("output_layer", Affects.checkpoint),
    "model.adapter_sha256": ("model_adapter_sha256", Affects.checkpoint),
}
"""Properties of what the config refers to, found at run time: the field of status.json, and what depends on it. For the
config's own keys this is metadata of their fields (qwen_cl/config/)."""
DAMAGED = "damaged-"


@dataclass(frozen=True, slots=True)
class Resumption:
    """The outcome of preparing a folder for a run."""

    checkpoint: Checkpoint | None
    """The checkpoint to resume from; None to start from the beginning."""
    notes: list[str] = field(default_factory=list)
    """Messages for the user."""


def resume(
    folder: RunFolder, config: RunConfig, facts: Mapping[str, str | None], progress: VerifyProgress | None = None
) -> Resumption:
    """Prepare the folder for a run with this config: a new run, or the interrupted one that is in it.

    ``facts`` describe what the config refers to: ``data.hash``, ``model.fingerprint``, ``model.tokenizer`` and others.

    Raises:
        UserError: the folder holds another run, a finished one, or one without a valid checkpoint. Nothing was changed.
    """
    status = folder.status()
    state = status.state
    if state is None:
        return Resumption(None)
    if not isinstance(config.resume, AutoResumeConfig) or (state is State.COMPLETED and not _may_be_extended(config)):
        raise UserError(
            f"hydra.run.dir ({folder.directory}) holds a run already ({state}); choose another folder, or "
            "remove it first"
        )
    recorded = {**_facts_of(status), **recorded_config(folder)}
    _require_same_run(folder, config, recorded, facts, config.resume.allow_changes)
    return prepare_resume(folder, progress)


def prepare_resume(folder: RunFolder, progress: VerifyProgress | None = None) -> Resumption:
    """Choose the checkpoint, and discard what was recorded after it.

    Raises:
        UserError: there are checkpoints, and none is valid. Nothing was changed.
    """
    checkpoint, damaged = latest_valid_checkpoint(folder.checkpoints, progress)
    problems = [f"{found.path.name}: {reason}" for found, reason in damaged]
    if checkpoint is None and damaged:
        raise UserError(
            f"no checkpoint in {folder.checkpoints} is valid ({'; '.join(problems)}); restore its files, or "
            "remove that folder to start the run from the beginning"
        )
    for found, _ in damaged:
        _archive(found)
    if folder.checkpoints.is_dir():
        clear_leftovers(folder.checkpoints)
    step = 0 if checkpoint is None else checkpoint.step
    _discard_after(folder, step)
    notes = [
        f"checkpoints/{text}; renamed to checkpoints/{DAMAGED}{found.path.name}"
        for (found, _), text in zip(damaged, problems)
    ]
    if checkpoint is None:
        notes.append("no checkpoint was saved before this run was interrupted: starting from the beginning")
    else:
        notes.append(f"resuming from checkpoints/{checkpoint.path.name} (checksums verified)")
    before = folder.status()
    folder.update_status(
        step=step,
        resume_from=None if checkpoint is None else str(checkpoint.path),
        resumed=[*before.resumed, {"time": now().isoformat(), "step": step, "state": before.state}],
    )
    return Resumption(checkpoint, notes)


def recorded_config(folder: RunFolder) -> dict[str, Any]:
    """Return the result-affecting values that the run was started with, by full key.

    Raises:
        UserError: its config.yaml cannot be read.
    """
    return result_affecting_leaves(to_plain(read_run_config(folder.config)))


def _may_be_extended(config: RunConfig) -> bool:
    """Return whether a finished run may be trained longer."""
    return isinstance(config.resume, AutoResumeConfig) and "task.max_steps" in config.resume.allow_changes


def _facts_of(status: RunStatus) -> dict[str, str | None]:
    return {key: getattr(status, name) for key, (name, _) in FACTS.items()}


def _affects(key: str) -> Affects:
    return FACTS[key][1] if key in FACTS else affects(key)


def _require_same_run(
    folder: RunFolder, config: RunConfig, recorded: Mapping[str, Any], facts: Mapping[str, Any], allow: Sequence[str]
) -> None:
    requested = {**result_affecting_leaves(to_plain(config)), **facts}
    for name in allow:
        if not any(_covers(name, key) for key in requested):
            raise UserError(f"resume.allow_changes ({name}) is not a config key; write it in full, like task.max_steps")
    differing = [
        key
        for key in sorted(recorded.keys() | requested.keys())
        if recorded.get(key) != requested.get(key)
        and _affects(key) is not Affects.execution
        and (_affects(key) is Affects.checkpoint or not any(_covers(name, key) for name in allow))
    ]
    if not differing:
        return
    shown = "; ".join(f"{key} was {_value(recorded, key)} and is {_value(requested, key)}" for key in differing)
    if any(_affects(key) is Affects.checkpoint for key in differing):
        fix = "or choose another folder: its checkpoints are incompatible"
    else:
        fix = f"choose another folder, or resume anyway with 'resume.allow_changes=[{','.join(differing)}]'"
    raise UserError(
        f"hydra.run.dir ({folder.directory}) holds a run that was started with other values: {shown}. Restore the "
        f"original overrides{_original_overrides(folder)}, {fix}"
    )


def _covers(name: str, key: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _value(leaves: Mapping[str, Any], key: str) -> str:
    value = leaves.get(key)
    return str(value)[:80] if key in leaves and value is not None else "not set"


def _original_overrides(folder: RunFolder) -> str:
    overrides = read_overrides(folder.directory)
    return "" if overrides is None else f" ({' '.join(overrides) or 'no overrides'})"


def _archive(checkpoint: Checkpoint) -> None:
    archived = checkpoint.path.with_name(f"{DAMAGED}{checkpoint.path.name}")
    shutil.rmtree(archived, ignore_errors=True)
    checkpoint.path.rename(archived)


def _discard_after(folder: RunFolder, step: int) -> None:
    """Discard what was recorded after the checkpoint: those steps are trained and recorded again."""
    for path, last in ((folder.metrics_file, step), (folder.samples, 0)):  # samples: first and last step
        if path.is_file():
            retained = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= last]
            write_text(path, "".join(f"{line}\n" for line in (retained if step else [])))
    shutil.rmtree(folder.adapter, ignore_errors=True)  # exported at a step that is trained again


def _step_of(line: str) -> float:
    """Return the step of a record; infinity for a line that was not written completely."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def main(directory: str) -> int:
    register_schemas()
    folder = RunFolder(directory)
    try:
        if folder.status().state is None:
            raise UserError(f"{folder.directory} is not the folder of a run: it has no status.json")
        if not folder.metrics_file.exists() and not folder.checkpoints.exists():
            return 0
        for note in prepare_resume(folder).notes:
            print(note)
    except UserError as error:
        print(error, file=sys.stderr)
        folder.finish(State.FAILED, str(error), FailureKind.invalid_input)
        return UserError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
