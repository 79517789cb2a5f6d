"""Who runs the trials of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen_cl.config.clusters import SlurmConfig
from qwen_cl.config.schema import ClusterConfig
from qwen_cl.sweep.jobs import JobStarter
from qwen_cl.sweep.processes import ProcessStarter
from qwen_cl.sweep.running import Starter


def make_starter(clusters: Sequence[ClusterConfig], directory: Path, hydra_arguments: Sequence[str]) -> Starter:
    """``clusters`` are the trials', all of one kind (``make_slots``)."""
    return JobStarter(directory) if isinstance(clusters[0], SlurmConfig) else ProcessStarter(hydra_arguments)
