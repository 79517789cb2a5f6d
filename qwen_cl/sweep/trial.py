"""One trial: what it is, what identifies it, and where it is kept."""

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
"""In a trial's folder, written before it starts: which trial it is, how often it was started, what that took."""


@dataclass(frozen=True, slots=True)
class Trial:
    number: int
    """Of the sweep's folder, from 0 on; a continued sweep keeps it."""
    name: str
    """Also of its folder: the number and what differs from the other trials."""
    overrides: tuple[str, ...]
    differing: dict[str, str]
    """The keys that tell it from the other trials, with its values."""
    folder: RunFolder
    plan: Plan
    config_hash: str

    @property
    def record_file(self) -> Path:
        return self.folder.directory / RECORD

    @property
    def invocation(self) -> Invocation:
        said = list(self.overrides)
        return Invocation(output_dir=self.folder.directory, overrides=said, typed=said, runtime={})

    def record(self) -> dict[str, Any]:
        """Of its last start; empty before the first."""
        return read_record(self.record_file)

    def begin(self, before: dict[str, Any], gpus: float, visible: Sequence[str] = ()) -> None:
        """``before`` is the record of its last start, whose costs count; ``gpus`` is how many it takes, or what part
        of one, and ``visible`` which, where that is ours to say."""
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

    def make_room(self) -> None:
        """Before it starts again: it goes on in its folder, or begins in a new one."""
        if not isinstance(self.plan.config.resume, AutoResumeConfig):
            self.folder.archive()

    def renew(self) -> None:
        """What tells it from the others may have become more since it was started: a command added values."""
        record = self.record()
        if record and not self.differing.items() <= record["differing"].items():
            write_json({**record, "differing": {**record["differing"], **self.differing}}, self.record_file)

    def end(self, at: float) -> None:
        """Count what it took, if nobody has; ``at`` is seconds since the epoch."""
        if (started := self.record().get("started")) is not None:
            self.count(at - started)

    def count(self, seconds: float) -> None:
        """What it took since it was begun, if nobody has counted that."""
        record = self.record()
        if record.get("started") is None:
            return
        seconds = max(0.0, seconds)
        record["seconds"] = round(record["seconds"] + seconds, 3)
        record["gpu_seconds"] = round(record["gpu_seconds"] + seconds * record["gpus"], 3)
        write_json({**record, "started": None}, self.record_file)


def identify(trials: Sequence[tuple[tuple[str, ...], Plan]], keys: Sequence[str], directory: Path) -> list[Trial]:
    """Numbers and names for checked overrides. What the sweep's folder has already keeps its own; what is the same
    trial as one before, with other words, is left out.

    ``keys`` are those that differ between the trials.
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
            this, name = record["number"], record["name"]
        else:
            this, name = number, trial_name(number, differing)
            number += 1
        folder = RunFolder(directory / name)
        found[config_hash] = Trial(this, name, tuple(overrides), differing, folder, plan, config_hash)
    return list(found.values())


def hash_config(plan: Plan) -> str:
    """Of everything that the result depends on: the resolved config, with the model's commit, and the data. Its keys
    are spelled as when sweeps first had such a hash."""
    leaves = earlier_names(leaves_to_compare(to_plain(plan.config)))
    if plan.automatic_micro_batch:  # another machine would settle it otherwise, to the same result
        leaves["task.micro_batch_size"] = AUTO
    text = json.dumps([leaves, plan.content()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def trial_name(number: int, differing: dict[str, str]) -> str:
    """Letters, digits, dots, dashes and underscores: it must need no quotes, in a shell or in an override."""
    parts = [
        _sanitised(value if key in GROUPS else f"{key.rpartition('.')[2]}_{value}") for key, value in differing.items()
    ]
    return "-".join([f"{number:02}", *filter(None, parts)])[:LONGEST_NAME].rstrip("-_.")


def read_records(directory: Path) -> Iterable[dict[str, Any]]:
    """Of every trial that was ever started in a sweep's folder, by number; not of what was moved aside."""
    paths = [path for path in directory.glob(f"*/{RECORD}") if ARCHIVED not in path.parent.name]
    return sorted(map(read_record, paths), key=lambda record: int(record["number"]))


def read_record(path: Path) -> dict[str, Any]:
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
    """Atomic: a reader sees the old file or the new one."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _sanitised(text: str) -> str:
    text = re.sub(r"e\+(?=\d)", "e", text.replace("hf://", ""))  # 1e+30 is not 1e-30
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-._")[:40]
