"""Build an ordinary NeMo 2.0 recipe from a run's config. Pure: builds and returns, starts nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import nemo_run as run
import torch
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, WarmupHoldAnnealScheduler

from qwen_cl.config.cluster import Precision
from qwen_cl.config.data import MockDataConfig, TextDataConfig
from qwen_cl.config.replay import FileReplayConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.config.task.training import LrSchedule, PretrainConfig
from qwen_cl.data.chat.settings import chat_settings
from qwen_cl.data.datamodule import MockDataModule, RowDataModule, TextDataModule
from qwen_cl.data.rows import row_files
from qwen_cl.models.adapter_methods import adapter_of
from qwen_cl.models.architecture import Architecture
from qwen_cl.models.loading.nemo_hooks import AdaptedRestoreConfig
from qwen_cl.planning.devices import cpu_cores
from qwen_cl.planning.speed import has_static_shapes
from qwen_cl.runs.folder import RunFolder
from qwen_cl.training.callbacks.build import build_callbacks
from qwen_cl.training.callbacks.checkpoint import StepCheckpoint
from qwen_cl.training.model.build import build_model

MOST_WRITERS = 8
"""As many as the files that qwen_cl/runs/manifest.py reads at once."""


def build_recipe(
    config: RunConfig, architecture: Architecture, folder: RunFolder, resume_from: str | None = None
) -> run.Partial:
    """Return the recipe of a run.

    ``config`` has its source pinned and its accelerator and precision resolved (``plan.make_plan``). ``resume_from`` is
    the folder of a verified checkpoint of this run.
    """
    peft = _peft(config)
    tokenizer = run.Config(AutoTokenizer, pretrained_model_name=str(folder.tokenizer))
    parts = {
        "model": build_model(config, architecture, tokenizer),
        "trainer": _trainer(config, architecture, folder.directory),
        "data": _data(config, architecture, tokenizer, folder),
        "log": _log(config, folder.directory),
        "optim": _optimizer(config),
        "resume": run.Config(
            nl.AutoResume,
            resume_from_path=resume_from,
            restore_config=_restore(config),
        ),
    }
    if peft is None and isinstance(config.training, PretrainConfig):
        return run.Partial(llm.pretrain, **parts)
    # llm.pretrain takes no adapter; with an adapter, llm.finetune differs only in that argument.
    return run.Partial(llm.finetune, **parts, peft=peft)


def _restore(config: RunConfig) -> run.Config:
    source, adapter = config.model.source, config.model.adapter
    if adapter is None:
        return run.Config(nl.RestoreConfig, path=source, load_artifacts=False)
    return run.Config(AdaptedRestoreConfig, path=source, load_artifacts=False, adapter=adapter)


def _trainer(config: RunConfig, architecture: Architecture, output_dir: Path) -> run.Config:
    cluster, task = config.cluster, config.training
    return run.Config(
        nl.Trainer,
        accelerator=config.cluster.accelerator.value,
        devices=cluster.devices,
        num_nodes=cluster.world_size // cluster.devices,
        max_steps=task.max_steps,
        limit_val_batches=0,  # RunRecorder evaluates
        num_sanity_val_steps=0,
        log_every_n_steps=task.max_steps + 1,  # never: RunRecorder logs, under one set of names
        enable_progress_bar=False,
        use_distributed_sampler=False,
        logger=False,  # RunRecorder logs
        callbacks=build_callbacks(config, architecture, output_dir),
        plugins=run.Config(nl.MegatronMixedPrecision, precision=_lightning_precision(config)),
        strategy=run.Config(
            nl.MegatronStrategy,
            tensor_model_parallel_size=cluster.tensor_parallel,
            pipeline_model_parallel_size=cluster.pipeline_parallel,
            pipeline_dtype=_pipeline_dtype(config),
            context_parallel_size=cluster.context_parallel,
            sequence_parallel=cluster.sequence_parallel,
            ckpt_async_save=True,
            ckpt_torch_dist_multiproc=_writers(cluster.devices),
            # The distributed optimizer's default format does not support the scalar step of torch's Adam.
            ckpt_optim_fully_reshardable=True,
        ),
    )


def _writers(ranks: int) -> int:
    """Return the processes of each rank that write a checkpoint, and the threads that hash it.

    One per core of the rank's share of the host, and at least Megatron's default of two. One core hashes half a
    gigabyte per second, and disks are faster.
    """
    return min(MOST_WRITERS, max(2, cpu_cores() // ranks))


def _lightning_precision(config: RunConfig) -> str:
    return "32" if config.cluster.precision is Precision.fp32 else "bf16-mixed"


def _pipeline_dtype(config: RunConfig) -> torch.dtype | None:
    if config.cluster.pipeline_parallel == 1:
        return None
    return torch.float32 if config.cluster.precision is Precision.fp32 else torch.bfloat16


def _data(config: RunConfig, architecture: Architecture, tokenizer: run.Config, folder: RunFolder) -> run.Config:
    task = config.training
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "seq_length": task.sequence_length,
        "micro_batch_size": task.resolved_micro_batch_size,
        "global_batch_size": task.global_batch_size,
        "max_steps": task.max_steps,
        "seed": config.seed,
        "static_shapes": has_static_shapes(config),
    }
    if isinstance(config.data, MockDataConfig):
        return run.Config(MockDataModule, rows=config.data.rows, vocab_size=architecture.vocab_size, **common)
    common |= _mixture(config)
    if isinstance(config.data, TextDataConfig):
        return run.Config(TextDataModule, target=_text_target(folder), **common)
    files = row_files(config.data, task)
    assert files is not None
    return run.Config(RowDataModule, **{**asdict(files), "moved": _moved_rows(folder)}, **common)


def _mixture(config: RunConfig) -> dict[str, Any]:
    task = config.training
    replay = config.replay if isinstance(config.replay, FileReplayConfig) else None
    return {
        "loss_on": task.trained_tokens.value,
        "packing": task.is_packed,
        "replay": dict(replay.datasets) if replay else {},
        "replay_shares": replay.shares if replay else {},
        "retention": dict(config.retention.eval_sets),
        "chat": chat_settings(config.data, from_run=True).non_defaults(),
    }


def _moved_rows(folder: RunFolder) -> list[int]:
    """Return the validation rows that the launcher found to be trained on; none in most runs."""
    moved: list[int] = json.loads(folder.moved_rows.read_text(encoding="utf-8")) if folder.moved_rows.exists() else []
    return moved


def _text_target(folder: RunFolder) -> dict[str, Any] | str:
    """Return what the launcher has tokenized; a dry run has not tokenized anything."""
    if not folder.text_target.exists():
        return "tokenized when the run starts"
    target: dict[str, Any] = json.loads(folder.text_target.read_text(encoding="utf-8"))
    return target


def _log(config: RunConfig, output_dir: Path) -> run.Config:
    return run.Config(
        nl.NeMoLogger,
        explicit_log_dir=str(output_dir / "nemo"),  # separate from the run's folder, as NeMo moves all files in it
        update_logger_directory=False,
        log_global_rank_0_only=True,
        ckpt=run.Config(
            StepCheckpoint,
            dirpath=str(output_dir / "checkpoints"),
            every_n_train_steps=config.training.checkpoint_interval,
            async_save=config.training.async_save,
            keep_last=config.training.keep_last,
            keep_best=config.training.keep_best,
        ),
    )


def _optimizer(config: RunConfig) -> run.Config:
    task = config.training
    fp32 = config.cluster.precision is Precision.fp32
    return run.Config(
        nl.MegatronOptimizerModule,
        config=run.Config(
            OptimizerConfig,
            optimizer="adam",
            lr=config.lr,
            weight_decay=task.weight_decay,
            clip_grad=task.clip_grad,
            bf16=not fp32,
            fp16=False,
            params_dtype=torch.float32 if fp32 else torch.bfloat16,
            use_distributed_optimizer=True,
        ),
        lr_scheduler=_schedule(config),
    )


def _schedule(config: RunConfig) -> run.Config:
    task = config.training
    minimum = config.lr * task.min_lr_ratio
    if task.lr_schedule is LrSchedule.warmup_hold_decay:
        hold_steps = task.max_steps - task.warmup_steps - task.decay_steps
        # NeMo truncates these ratios to whole steps.
        ratios = [(steps + 0.5) / task.max_steps for steps in (task.warmup_steps, hold_steps)]
        return run.Config(
            WarmupHoldAnnealScheduler,
            max_steps=task.max_steps,
            warmup_ratio=ratios[0],
            hold_ratio=ratios[1],
            min_lr=minimum,
        )
    return run.Config(
        CosineAnnealingScheduler,
        max_steps=task.max_steps,
        warmup_steps=task.warmup_steps,
        constant_steps=0,
        min_lr=config.lr if task.lr_schedule is LrSchedule.constant else minimum,
    )


def _peft(config: RunConfig) -> run.Config | None:
    adapter = adapter_of(config.peft)
    if adapter is None:
        return None
    return run.Config(resolve_name(adapter.entry.transform), **adapter.transform_arguments())
