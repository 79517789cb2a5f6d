"""Going on with a run that was cut off: is it the same run, which of its checkpoints is good, what is cut away.

``python -m qwen_cl.runs.resume RUN_DIRECTORY`` makes the choice before a run's processes start where no launcher is
there to make it: in a batch script, which may run again. No torch."""

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
from qwen_cl.config.saved import leaves_of_consequence, read_overrides, read_run_config, to_plain
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
"""What a run finds out of what its config names: the field of status.json, and what depends on it. Of the config's own
keys their fields say that (qwen_cl/config/)."""
DAMAGED = "damaged-"


@dataclass(frozen=True, slots=True)
class Resumption:
    checkpoint: Checkpoint | None
    """Where to go on from; None for the beginning."""
    notes: list[str] = field(default_factory=list)
    """For the user."""


def resume(
    folder: RunFolder, config: RunConfig, facts: Mapping[str, str | None], progress: VerifyProgress | None = None
) -> Resumption:
    """Make the folder ready for a run with this config: a new one, or the one that was cut off in it.

    ``facts`` are of what the config names: ``data.hash``, ``model.fingerprint``, ``model.tokenizer`` and others.

    Raises:
        UserError: it holds another run, or a finished one, or one with no checkpoint that is good. Nothing was changed.
    """
    status = folder.status()
    state = status.state
    if state is None:
        return Resumption(None)
    if not isinstance(config.resume, AutoResumeConfig) or (state is State.COMPLETED and not _goes_further(config)):
        raise UserError(
            f"hydra.run.dir ({folder.directory}) holds a run already ({state}); choose another folder, or "
            "remove it first"
        )
    _require_same_run(folder, config, {**_facts_of(status), **leaves_then(folder)}, facts, config.resume.allow_changes)
    return prepare_resume(folder, progress)


def prepare_resume(folder: RunFolder, progress: VerifyProgress | None = None) -> Resumption:
    """Choose the checkpoint, and cut away what came after it.

    Raises:
        UserError: there are checkpoints, and none is good. Nothing was changed.
    """
    checkpoint, damaged = latest_valid_checkpoint(folder.checkpoints, progress)
    said = [f"{found.path.name}: {reason}" for found, reason in damaged]
    if checkpoint is None and damaged:
        raise UserError(
            f"no checkpoint in {folder.checkpoints} is what was saved ({'; '.join(said)}); put its files back, or "
            "remove that folder to start the run again from its beginning"
        )
    for found, _ in damaged:
        _set_aside(found)
    if folder.checkpoints.is_dir():
        clear_leftovers(folder.checkpoints)
    step = 0 if checkpoint is None else checkpoint.step
    _cut(folder, step)
    notes = [
        f"checkpoints/{text}; it is now checkpoints/{DAMAGED}{found.path.name}"
        for (found, _), text in zip(damaged, said)
    ]
    if checkpoint is None:
        notes.append("nothing was saved before this run was cut off: it starts again from its beginning")
    else:
        notes.append(f"going on from checkpoints/{checkpoint.path.name}, whose files are what was saved")
    before = folder.status()
    folder.update_status(
        step=step,
        resume_from=None if checkpoint is None else str(checkpoint.path),
        resumed=[*before.resumed, {"time": now().isoformat(), "step": step, "state": before.state}],
    )
    return Resumption(checkpoint, notes)


def leaves_then(folder: RunFolder) -> dict[str, Any]:
    """What the run was started with, by full key.

    Raises:
        UserError: its config.yaml cannot be read.
    """
    return leaves_of_consequence(to_plain(read_run_config(folder.config)))


def _goes_further(config: RunConfig) -> bool:
    """A finished run may be trained longer, if that is said."""
    return isinstance(config.resume, AutoResumeConfig) and "task.max_steps" in config.resume.allow_changes


def _facts_of(status: RunStatus) -> dict[str, str | None]:
    return {key: getattr(status, name) for key, (name, _) in FACTS.items()}


def _affects(key: str) -> Affects:
    return FACTS[key][1] if key in FACTS else affects(key)


def _require_same_run(
    folder: RunFolder, config: RunConfig, then: Mapping[str, Any], facts: Mapping[str, Any], allow: Sequence[str]
) -> None:
    today = {**leaves_of_consequence(to_plain(config)), **facts}
    for name in allow:
        if not any(_covers(name, key) for key in today):
            raise UserError(f"resume.allow_changes ({name}) is no key of a run; write it in full, like task.max_steps")
    differing = [
        key
        for key in sorted(then.keys() | today.keys())
        if then.get(key) != today.get(key)
        and _affects(key) is not Affects.execution
        and (_affects(key) is Affects.checkpoint or not any(_covers(name, key) for name in allow))
    ]
    if not differing:
        return
    shown = "; ".join(f"{key} was {_value(then, key)} and is {_value(today, key)}" for key in differing)
    if any(_affects(key) is Affects.checkpoint for key in differing):
        fix = "or choose another folder: its checkpoints fit nothing else"
    else:
        fix = f"choose another folder, or go on all the same with 'resume.allow_changes=[{','.join(differing)}]'"
    raise UserError(
        f"hydra.run.dir ({folder.directory}) holds a run that was started with something else: {shown}. Say it as then"
        f"{_said_then(folder)}, {fix}"
    )


def _covers(name: str, key: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _value(leaves: Mapping[str, Any], key: str) -> str:
    value = leaves.get(key)
    return str(value)[:80] if key in leaves and value is not None else "not set"


def _said_then(folder: RunFolder) -> str:
    said = read_overrides(folder.directory)
    return "" if said is None else f" ({' '.join(said) or 'no overrides'})"


def _set_aside(checkpoint: Checkpoint) -> None:
    aside = checkpoint.path.with_name(f"{DAMAGED}{checkpoint.path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.path.rename(aside)


def _cut(folder: RunFolder, step: int) -> None:
    """What was recorded after the checkpoint is recorded again, so that each step is there once."""
    for path, last in ((folder.metrics_file, step), (folder.samples, 0)):  # samples are of the beginning and the end
        if path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= last]
            write_text(path, "".join(f"{line}\n" for line in (kept if step else [])))
    shutil.rmtree(folder.adapter, ignore_errors=True)  # of a step that is trained again


def _step_of(line: str) -> float:
    """Beyond every step for a line that was cut off while it was written."""
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
