"""A run's worker that treats each model as a large one, which is not compared with transformers.

Run by ``tests.support.ranks``. Megatron does not check the gradients either, so that a step makes all weights NaN.
"""

from __future__ import annotations

from typing import Any

from qwen_cl.training import worker


def main(directory: str) -> int:
    load: Any = worker.load_recipe

    def load_recipe(*arguments: Any) -> Any:
        import nemo_run as run
        from megatron.core.distributed import DistributedDataParallelConfig

        from qwen_cl.training.callbacks import build

        vars(build)["VERIFIED_PARAMETERS"] = 0
        built = load(*arguments)
        unwatched = run.Config(
            DistributedDataParallelConfig, check_for_nan_in_grad=False, use_distributed_optimizer=True
        )
        built.trainer.strategy.ddp = unwatched
        return built

    vars(worker)["load_recipe"] = load_recipe
    return worker.main(directory)
