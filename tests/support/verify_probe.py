"""A run's worker, with one weight changed between the loading of the model and the first step.

Run by ``tests.support.ranks``.
"""

from __future__ import annotations

from typing import Any

from qwen_cl.training import worker


def main(directory: str) -> int:
    build: Any = worker.load_recipe

    def load_recipe(*arguments: Any) -> Any:
        import lightning.pytorch as pl
        import nemo_run as run

        class ChangeOneWeight(pl.Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                parameters = dict(trainer.strategy.megatron_parallel.named_parameters())
                name = next(name for name in parameters if name.endswith("layers.1.mlp.linear_fc2.to_wrap.weight"))
                parameters[name].data[3] *= -1

        recipe = build(*arguments)
        recipe.trainer.callbacks.insert(0, run.Config(ChangeOneWeight))
        return recipe

    vars(worker)["load_recipe"] = load_recipe
    return worker.main(directory)
