"""Trains a run folder's config for a few steps and saves the live Megatron model's logits before and after.

``python tests/probe.py RUN_DIRECTORY``: a process of its own, because Megatron on a CPU changes torch for good.
Adapters are disturbed first, so that a wrong export cannot hide behind weights that are still zero.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from qwen_cl.config.file import load_config
from qwen_cl.config.store import register_schemas
from qwen_cl.run_folder import RunFolder
from qwen_cl.worker import load_recipe, prepare


def main(directory: Path) -> None:
    register_schemas()
    folder = RunFolder(directory)
    config = load_config(folder.config)
    prepare(config)
    import fiddle
    import lightning.pytorch as pl
    import torch
    from safetensors.torch import save_file

    class Probe(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 0:
                generator = torch.Generator().manual_seed(0)
                for name, parameter in trainer.strategy.megatron_parallel.named_parameters():
                    if ".adapter." in name:
                        noise = torch.randn(parameter.shape, generator=generator)
                        parameter.data.add_(noise * 0.05)
                for optimizer in trainer.strategy.optimizers:
                    optimizer.reload_model_params()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            model = trainer.strategy.megatron_parallel.eval()
            ids = torch.arange(48).view(2, 24) * 7 % 1400
            positions = torch.arange(24).expand(2, 24)
            with torch.no_grad():
                logits = model[0](input_ids=ids, position_ids=positions, attention_mask=None)
            save_file({"ids": ids, "logits": logits.contiguous()}, str(directory / "probe.safetensors"))

    task = fiddle.build(load_recipe(config, folder))
    task.keywords["trainer"].callbacks.insert(0, Probe())
    task()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
