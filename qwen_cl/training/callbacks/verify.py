"""Verify the loaded model: ``model.verify=logits`` compares its loss with that of transformers on the same files."""

from __future__ import annotations

import gc
import json
import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from qwen_cl.data.examples import Example
from qwen_cl.models.architecture import read_architecture
from qwen_cl.models.formats.tensor_files import INDEX, SINGLE, weight_files
from qwen_cl.models.normalized import normalized_config, transformers_config
from qwen_cl.models.reference import local_directory, read_model_config
from qwen_cl.runs.folder import RunFolder
from qwen_cl.training.callbacks.base import RunCallback
from qwen_cl.training.model.evaluation import sum_losses

logger = logging.getLogger(__name__)
PROBE_ROWS, PROBE_TOKENS = 2, 128
LEAST_KNOWLEDGE = 0.5
"""Nats by which a trained model's loss is below chance, at least on one of the probed texts."""
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""Allowed difference of the mean loss. Measured on a CPU: below 1e-5 in fp32, below 1e-2 in bf16 against fp32."""


class VerificationError(RuntimeError):
    """The loaded model does not compute what transformers computes, or has random weights."""


class VerifyLogits(RunCallback):
    """The comparison of the loss of a few examples before the first step. A new adapter does not change the loss yet.

    A resumed run is not compared, because its weights are trained.
    """

    def __init__(self, source: str, adapter: str | None, output_dir: str, precision: str) -> None:
        self.source, self.adapter = source, adapter
        self.precision = precision
        self.folder = RunFolder(output_dir)

    def on_step_zero(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        examples = _probe_examples(trainer.datamodule.train_dataset)
        total, tokens = sum_losses(trainer.strategy.megatron_parallel, examples, len(examples))
        loss = total / tokens
        expected = torch.zeros((), device=torch.cuda.current_device())
        if trainer.is_global_zero:
            expected += transformers_loss(self.source, self.adapter, examples)
            self.folder.update_status(verified={"loss": loss, "transformers": float(expected)})
        torch.distributed.broadcast(expected, src=0)
        logger.info("Loss of a probe batch: %.6f here, %.6f by transformers", loss, expected)
        tolerance = TOLERANCE[self.precision]
        if not abs(loss - float(expected)) <= tolerance:  # also true for NaN
            raise VerificationError(
                f"model.verify: the loss of a probe batch is {loss:.4f} and transformers has "
                f"{float(expected):.4f} for the same files and tokens (allowed difference: {tolerance:g}); the "
                "loaded model is not the published one"
            )


class CheckLossBelowChance(RunCallback):
    """The refusal of a run whose first losses, on the training text and all evaluation sets, are those of random
    weights."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def on_step_zero(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data, chance = trainer.datamodule, math.log(self.vocab_size)
        probes = [
            _probe_examples(data.train_dataset),
            *(scored.examples[:PROBE_ROWS] for scored in data.evaluation_sets),
        ]
        sums = [sum_losses(trainer.strategy.megatron_parallel, examples, len(examples)) for examples in probes]
        best = min(total / tokens for total, tokens in sums)
        if not best < chance - LEAST_KNOWLEDGE:
            raise VerificationError(
                f"model.verify: the loss before the first step is {best:.2f} at best, and that of random weights is "
                f"about {chance:.2f} (the logarithm of the vocabulary): it has no trained weights; if "
                "they are meant to be random, set model.verify=none"
            )


def _probe_examples(dataset: Any) -> list[Example]:
    """Return the start of the first training examples with all tokens as loss tokens, as the weights are verified."""
    starts = [dataset[number].ids[:PROBE_TOKENS] for number in range(min(PROBE_ROWS, len(dataset)))]
    return [Example(ids, ((1, len(ids)),)) for ids in starts]


@torch.no_grad()
def transformers_loss(source: str, adapter: str | None, examples: list[Example]) -> float:
    """Return the loss by transformers and PEFT in fp32 on the CPU, one example at a time, and free the model."""
    from transformers import AutoModelForCausalLM

    directory = local_directory(source)
    published = read_model_config(directory)
    normalized = normalized_config(published, read_architecture(published, directory))
    config = transformers_config(normalized)
    with _model_alone(directory, normalized) as alone:
        model = AutoModelForCausalLM.from_pretrained(
            alone, config=config, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    total = count = 0.0
    for example in examples:
        ids = torch.tensor([example.ids])
        labels = len(example.ids) - 1
        total += float(model(ids, labels=ids).loss) * labels
        count += labels
    del model
    gc.collect()
    return total / count


@contextmanager
def _model_alone(directory: Path, config: dict[str, Any]) -> Iterator[Path]:
    """Yield a folder of links to the weights with the config: transformers would load an adapter in the same folder.

    Without a config, transformers 5 fails because it finds no generation config.
    """
    files = weight_files(directory)
    if [path.name for path in files] != [SINGLE]:
        files.append(directory / INDEX)
    with tempfile.TemporaryDirectory() as alone:
        for path in files:
            (Path(alone) / path.name).symlink_to(path.absolute())
        (Path(alone) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield Path(alone)
