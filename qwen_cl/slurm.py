"""A run as a Slurm batch script, rendered by NeMo-Run's executor."""

from __future__ import annotations

import shlex

from qwen_cl.config.schema import ModelConfig, SlurmConfig
from qwen_cl.execute import ROOT
from qwen_cl.run_folder import RunFolder
from qwen_cl.source.settings import HubSettings


def build_executor(cluster: SlurmConfig, model: ModelConfig, folder: RunFolder) -> object:
    """One task per GPU: Lightning reads ranks and addresses from Slurm's own variables. No secret goes into the
    script: keys come from the inherited environment."""
    from nemo_run import LocalTunnel, SlurmExecutor

    return SlurmExecutor(
        account=cluster.account,
        partition=cluster.partition,
        nodes=cluster.nodes,
        ntasks_per_node=cluster.devices,
        gpus_per_node=cluster.devices,
        time=cluster.time,
        job_name_prefix="qwen_cl.",
        job_dir=str(folder.directory),
        tunnel=LocalTunnel(job_dir=str(folder.directory.parent)),
        srun_args=[f"--chdir={ROOT}"],
        setup_lines=cluster.setup or None,
        env_vars={
            "HF_HUB_CACHE": str(HubSettings.of(model).cache_directory),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        },
    )


def render_script(cluster: SlurmConfig, model: ModelConfig, folder: RunFolder) -> str:
    from nemo_run.run.torchx_backend.schedulers.slurm import SlurmBatchRequest

    command = f"python -m qwen_cl.worker {shlex.quote(str(folder.directory))}"
    request = SlurmBatchRequest(
        launch_cmd=["sbatch", "--parsable"],
        jobs=[folder.directory.parent.name],
        command_groups=[[command]],
        executor=build_executor(cluster, model, folder),
        max_retries=0,
        extra_env={},
    )
    return str(request.materialize())
