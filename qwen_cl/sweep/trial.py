"""A trial: its plan, its identity, and its record in its folder."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.invocation import Invocation
from qwen_cl.config.overrides import override_key
from qwen_cl.config.renamed_keys import earlier_names, rename_overrides
from qwen_cl.config.resume import AutoResumeConfig
from qwen_cl.config.saved import leaves_to_compare, to_plain
from qwen_cl.config.store import GROUPS
from qwen_cl.config.task.training import AUTO
from qwen_cl.files.atomic import write_text
from qwen_cl.planning.plan import Plan
from qwen_cl.runs.folder import ARCHIVED, RunFolder

LONGEST_NAME = 80
RECORD = "trial.json"
"""The file in a trial's folder with its identity, the number of attempts, and the time they took."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial of a sweep."""

    number: int
    """Number in the sweep's folder, from 0 on; kept when the sweep is resumed."""
    name: str
    """Name, also of its folder: the number and the values that differ from the other trials."""
    overrides: tuple[str, ...]
    differing: dict[str, str]
    """Its values of the keys that differ between the trials."""
    folder: RunFolder
    plan: Plan
    config_hash: str

    @property
    def record_file(self) -> Path:
        """The path of its record."""
        return self.folder.directory / RECORD

    @property
    def invocation(self) -> Invocation:
        """The invocation of its run."""
        overrides = list(self.overrides)
        return Invocation(output_dir=self.folder.directory, overrides=overrides, typed=overrides, runtime={})

    def record(self) -> dict[str, Any]:
        """Return the record of its last attempt; empty before the first."""
        return read_record(self.record_file)

    def begin(self, before: dict[str, Any], gpus: float, visible: Sequence[str] = ()) -> None:
        """Record the start of an attempt.

        ``before`` is the record of the attempt before, whose costs are added; ``gpus`` is the number of GPUs, or the
        fraction of a shared one; ``visible`` are their names, unless Slurm assigns them.
        """
        self.folder.directory.mkdir(parents=True, exist_ok=True)
        record = {
            "number": self.number,
            "name": self.name,
            "overrides": list(self.overrides),
            "differing": self.differing,
            "config_hash": self.config_hash,
            "max_steps": self.plan.config.training.max_steps,
            "attempts": before.get("attempts", 0) + 1,
            "seconds": before.get("seconds", 0.0),
            "gpu_seconds": before.get("gpu_seconds", 0.0),
            "gpus": gpus,
            "visible_devices": list(visible),
            "started": time.time(),
        }
        write_json(record, self.record_file)

    def archive_unless_resumed(self) -> None:
        """Rename the folder of an earlier attempt, unless the run resumes in it."""
        if not isinstance(self.plan.config.resume, AutoResumeConfig):
            self.folder.archive()

    def update_differing(self) -> None:
        """Add keys to its record that differ only since a later command added values."""
        record = self.record()
        if record and not self.differing.items() <= record["differing"].items():
            write_json({**record, "differing": {**record["differing"], **self.differing}}, self.record_file)

    def end(self, at: float) -> None:
        """Record the end of an attempt at ``at`` (seconds since the epoch), unless it is recorded."""
        if (started := self.record().get("started")) is not None:
            self.count(at - started)

    def count(self, seconds: float) -> None:
        """Add the duration of an attempt to its cost, unless it is recorded."""
        record = self.record()
        if record.get("started") is None:
            return
        seconds = max(0.0, seconds)
        record["seconds"] = round(record["seconds"] + seconds, 3)
        record["gpu_seconds"] = round(record["gpu_seconds"] + seconds * record["gpus"], 3)
        write_json({**record, "started": None}, self.record_file)


def identify(trials: Sequence[tuple[tuple[str, ...], Plan]], keys: Sequence[str], directory: Path) -> list[Trial]:
    """Number and name the trials of checked overrides.

    A trial that is in the sweep's folder keeps its number and name; overrides that resolve to the same config are one
    trial. ``keys`` are those that differ between the trials.
    """
    known = {record["config_hash"]: record for record in read_records(directory)}
    number = 1 + max((record["number"] for record in known.values()), default=-1)
    found: dict[str, Trial] = {}
    for overrides, plan in trials:
        config_hash = hash_config(plan)
        if config_hash in found:
            continue
        values = {override_key(text): text.partition("=")[2] for text in overrides}
        differing = {key: values[key] for key in keys if key in values}
        if config_hash in known:
            record = known[config_hash]
            own_number, name = record["number"], record["name"]
        else:
            own_number, name = number, trial_name(number, differing)
            number += 1
        folder = RunFolder(directory / name)
        found[config_hash] = Trial(own_number, name, tuple(overrides), differing, folder, plan, config_hash)
    return list(found.values())


def hash_config(plan: Plan) -> str:
    """Return a hash of everything that affects the result: the resolved config, the model's commit, and the data.

    The keys have their earliest names, so that the hashes in old sweep folders stay valid.
    """
    leaves = earlier_names(leaves_to_compare(to_plain(plan.config)))
    if plan.automatic_micro_batch:  # another machine may choose another size, with the same result
        leaves["task.micro_batch_size"] = AUTO
    text = json.dumps([leaves, plan.content()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def trial_name(number: int, differing: dict[str, str]) -> str:
    """Return a name that needs no quotes in a shell or an override: letters, digits, dots, dashes and underscores."""
    parts = [
        _sanitized(value if key in GROUPS else f"{key.rpartition('.')[2]}_{value}") for key, value in differing.items()
    ]
    return "-".join([f"{number:02}", *filter(None, parts)])[:LONGEST_NAME].rstrip("-_.")


def read_records(directory: Path) -> Iterable[dict[str, Any]]:
    """Return the records of all trials that were started in a sweep's folder, by number, without archived folders."""
    paths = [path for path in directory.glob(f"*/{RECORD}") if ARCHIVED not in path.parent.name]
    return sorted(map(read_record, paths), key=lambda record: int(record["number"]))


def read_record(path: Path) -> dict[str, Any]:
    """Read a trial's record; empty if there is none."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    differing = rename_overrides(f"{key}={value}" for key, value in record["differing"].items())
    return {
        **record,
        "overrides": rename_overrides(record["overrides"]),
        "differing": {key: value for key, _, value in (text.partition("=") for text in differing)},
    }


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _sanitized(text: str) -> str:
    text = re.sub(r"e\+(?=\d)", "e", text.replace("hf://", ""))  # 1e+30 is not 1e-30
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-._")[:40]
