"""The runs of NeMo's stock recipes from ``hf://Qwen/Qwen2.5-0.5B`` on the Hub that the environment names.

``python tests/support/stock_recipe_runs.py DIRECTORY RUN...``: a process of its own, because Megatron on a CPU changes
torch for good. Each run writes into DIRECTORY/RUN."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "hf://Qwen/Qwen2.5-0.5B"
ONE_GPU = {"num_nodes": 1, "num_gpus_per_node": 1}


def readme_code() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if "from_hugging_face" in block)


def main(directory: Path, names: list[str]) -> None:
    for name in names:
        (directory / name).mkdir(exist_ok=True)
        globals()[name](directory / name, directory / "data")


def upstream(directory: Path, data: Path) -> None:
    """Run a stock recipe before this package is imported."""
    import nemo_run as run
    from nemo.collections import llm

    recipe = llm.qwen25_500m.finetune_recipe(**ONE_GPU, peft_scheme="lora")
    recipe.resume.restore_config.path = SOURCE
    recipe.trainer.accelerator = "cpu"
    recipe.data = run.Config(llm.FineTuningDataModule, dataset_root=str(data))
    recipe.log.log_dir = str(directory / "log")
    (directory / "error.json").write_text(json.dumps(_error(lambda: run.run(recipe, direct=True))))


def readme(directory: Path, data: Path) -> None:
    from nemo.collections import llm

    from tests.support.stock_recipe import fit_this_machine

    stock = llm.qwen25_500m.finetune_recipe

    def finetune_recipe(**arguments: Any) -> Any:
        return fit_this_machine(stock(**arguments), directory, data)

    llm.qwen25_500m.finetune_recipe = finetune_recipe
    exec(readme_code(), {"__name__": "__main__"})


def full(directory: Path, data: Path) -> None:
    from nemo.collections import llm

    _train(llm.qwen25_500m.finetune_recipe(**ONE_GPU, peft_scheme=None), directory, data)


def pretrain(directory: Path, data: Path) -> None:
    from nemo.collections import llm

    _train(llm.qwen25_500m.pretrain_recipe(**ONE_GPU), directory, None)


def tensor_parallel(directory: Path, data: Path) -> None:
    """Run under torchrun, with a row of padding on the second rank."""
    from nemo.collections import llm

    recipe = llm.qwen25_500m.finetune_recipe(num_nodes=1, num_gpus_per_node=2, peft_scheme="lora")
    recipe.trainer.strategy.tensor_model_parallel_size = 2
    _train(recipe, directory, data, vocab_size=1538)


def plain(directory: Path, data: Path) -> None:
    """Run with NeMo's RestoreConfig, without a call of this package."""
    import nemo_run as run
    from nemo.collections import llm

    from tests.support.stock_recipe import fit_this_machine, forget_training

    recipe = fit_this_machine(llm.qwen25_500m.finetune_recipe(**ONE_GPU, peft_scheme="lora"), directory, data)
    recipe.resume.restore_config.path = SOURCE
    recipe.model.config.num_layers = 3
    (directory / "error.json").write_text(json.dumps(_error(lambda: run.run(recipe, direct=True))))
    recipe.model.config.num_layers = 2
    run.run(recipe, direct=True)
    forget_training()


def _train(recipe: Any, directory: Path, data: Path | None, **fields: Any) -> None:
    import nemo_run as run

    from qwen_cl import from_hugging_face
    from tests.support.stock_recipe import fit_this_machine, forget_training

    recipe = fit_this_machine(recipe, directory, data)
    for name, value in fields.items():
        setattr(recipe.model.config, name, value)
    run.run(from_hugging_face(recipe, SOURCE), direct=True)
    forget_training()


def _error(call: Any) -> list[str]:
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
