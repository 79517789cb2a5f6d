"""Render a run, or the trials of a sweep, as a Slurm batch script.

NeMo-Run's template is not used: it traces (``set -x``) every line with its values, so that a secret that
``cluster.setup`` reads from a file would be in the log; it writes values without quotes; and it requeues every failed
job, not only one that was asked to stop.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from qwen_cl.config.cluster import Accelerator, SlurmConfig
from qwen_cl.config.paths import ROOT
from qwen_cl.config.run import RunConfig
from qwen_cl.launch.local import inherited_environment, paths_to_mount, run_variables
from qwen_cl.reporting.tracking.identity import SWEEP, TRIAL_NAME
from qwen_cl.runs.folder import RunFolder

SCRIPT = "job.sh"
"""Name of the submitted script in a run's folder. A sweep has one per job or array, named by its number."""


def render_script(
    cluster: SlurmConfig, config: RunConfig, folders: Sequence[RunFolder], sweep: Path | None = None
) -> str:
    """Return the script of one run, or of the trials of one job array in the folder ``sweep``."""
    name = sweep.name if sweep else f"{folders[0].directory.parent.name}-{folders[0].directory.name}"
    log = folders[0].log if len(folders) == 1 else folders[0].directory.parent / "slurm.log"
    flags = _flags(cluster, name, log)
    if len(folders) > 1:
        flags["array"] = f"0-{len(folders) - 1}"
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    template = resources.files("qwen_cl.launch.slurm").joinpath("batch.sh.j2").read_text(encoding="utf-8")
    python = "python" if cluster.setup else shlex.quote(sys.executable)
    workers = "python" if cluster.container_image else python
    return environment.from_string(template).render(
        flags=[f"--{key}={shlex.quote(value)}" if value else f"--{key}" for key, value in flags.items()],
        directories=[shlex.quote(str(folder.directory)) for folder in folders],
        root=shlex.quote(str(ROOT)),
        variables=_variables(cluster, config, sweep),
        setup=cluster.setup,
        python=python,
        srun=" ".join([*_srun(cluster, config, sweep or folders[0].directory), workers]),
    )


def submitting_environment(cluster: SlurmConfig) -> dict[str, str]:
    """Return the environment that sbatch passes on.

    sbatch's own variables would override the script's options, and this machine does not choose where the ranks meet.
    """
    excluded = {f"SBATCH_{key.replace('-', '_').upper()}" for key in _flags(cluster, "", Path())}
    excluded |= {"SBATCH_TIMELIMIT", "SBATCH_ARRAY_INX", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in inherited_environment().items() if name not in excluded}


def _flags(cluster: SlurmConfig, name: str, log: Path) -> dict[str, str]:
    """Return the options of sbatch; flags have an empty value."""
    flags = {
        "job-name": "qwen_cl-" + re.sub(r"[^\w.-]+", "-", name),
        "account": cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "time": cluster.time,
        "nodes": str(cluster.nodes),
        "ntasks-per-node": str(cluster.devices),
        "gpus-per-node": str(cluster.devices) if cluster.accelerator is Accelerator.gpu else None,
        "signal": f"USR1@{cluster.grace_seconds}" if cluster.grace_seconds else None,
        "requeue" if cluster.max_requeues else "no-requeue": "",
        "output": str(log).replace("%", "%%"),
        "open-mode": "append",
        **cluster.options,
    }
    return {key: value for key, value in flags.items() if value is not None}


def _variables(cluster: SlurmConfig, config: RunConfig, sweep: Path | None) -> dict[str, str]:
    """Return the environment variables of the script, quoted for the shell."""
    variables = {name: shlex.quote(value) for name, value in run_variables(config).items()}
    variables["PYTHONPATH"] = f"{shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
    if cluster.accelerator is Accelerator.cpu:
        threads = f"SLURM_CPUS_ON_NODE > {cluster.devices} ? SLURM_CPUS_ON_NODE / {cluster.devices} : 1"
        variables["OMP_NUM_THREADS"] = f"${{OMP_NUM_THREADS:-$(({threads}))}}"
    if sweep is not None:
        variables |= {SWEEP: shlex.quote(str(sweep)), TRIAL_NAME: "${directory##*/}"}
    return variables


def _srun(cluster: SlurmConfig, config: RunConfig, output: Path) -> list[str]:
    """Return the options of srun. A rank that fails ends the others, which would wait for it."""
    options = ["--export=ALL", "--kill-on-bad-exit=1"]
    if cluster.container_image is None:
        return options
    mounts = [*(f"{path}:{path}" for path in paths_to_mount(config, output)), *cluster.container_mounts]
    return [
        *options,
        f"--container-image={shlex.quote(cluster.container_image)}",
        f"--container-mounts={shlex.quote(','.join(mounts))}",
        f"--container-workdir={shlex.quote(str(ROOT))}",
    ]
