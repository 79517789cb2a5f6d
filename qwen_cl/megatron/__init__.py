"""How Megatron runs here: on a CPU, and on a GPU without Transformer Engine."""

from __future__ import annotations

from functools import cache


@cache
def prepare(*, cpu: bool) -> None:
    """Before a recipe is built: everything that is changed in NeMo and Megatron, once per process."""
    from qwen_cl.megatron.imports import import_megatron

    import_megatron()
    if cpu:
        from qwen_cl.megatron import cpu as cpu_device

        cpu_device.install()
    # NeMo leans on modules that importing wandb happens to import.
    import lightning.pytorch.loggers
    import lightning.pytorch.utilities.types  # noqa: F401

    from qwen_cl.megatron import adapters, checkpointing, first_adapters, norms
    from qwen_cl.source import nemo

    adapters.install()
    first_adapters.install()
    norms.install()
    checkpointing.install(cpu=cpu)
    nemo.install()
