"""How Megatron runs here: on a CPU, and on a GPU without Transformer Engine."""

from __future__ import annotations

from functools import cache


@cache
def prepare(*, cpu: bool) -> None:
    """Before a recipe is built: everything that is changed in NeMo and Megatron, once per process."""
    from qwen_cl.patches.imports import import_megatron

    import_megatron()
    if cpu:
        from qwen_cl.patches import cpu_device as cpu_device

        cpu_device.install()
    # NeMo leans on modules that importing wandb happens to import.
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
