"""Prepare Megatron for this machine: a CPU, or a GPU without Transformer Engine."""

from __future__ import annotations

from functools import cache


@cache
def prepare(*, cpu: bool) -> None:
    """Apply all patches of NeMo and Megatron. Called once per process, before a recipe is built."""
    from qwen_cl.patches.imports import import_megatron

    import_megatron()
    if cpu:
        from qwen_cl.patches import cpu_device as cpu_device

        cpu_device.install()
    # NeMo depends on modules that wandb imports.
    import lightning.pytorch.loggers
    import lightning.pytorch.utilities.types  # noqa: F401

    from qwen_cl.models.loading import nemo_hooks
    from qwen_cl.patches import lora_and_dora, norms, torch_adam_checkpoints
    from qwen_cl.training.model import adapter_init

    lora_and_dora.install()
    adapter_init.install()
    norms.install()
    torch_adam_checkpoints.install(cpu=cpu)
    nemo_hooks.install()
