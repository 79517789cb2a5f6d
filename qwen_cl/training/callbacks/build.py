"""Build the callbacks of a run's recipe, in their order."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import nemo_run as run

from qwen_cl.config.data import MockDataConfig
from qwen_cl.config.model import VerifyMode
from qwen_cl.config.run import RunConfig
from qwen_cl.data.chat.stop_tokens import trains_on_conversations
from qwen_cl.models.adapter_methods import Adapter, adapter_of, adapter_parameters
from qwen_cl.models.architecture import Architecture
from qwen_cl.models.formats.nemo_layout import is_nemo_checkpoint
from qwen_cl.models.reference import local_directory
from qwen_cl.models.weight_mapping import count_parameters, expected_shapes
from qwen_cl.planning.flops import training_flops
from qwen_cl.training.callbacks.adapter import SaveAdapter
from qwen_cl.training.callbacks.heartbeat import HeartbeatCallback
from qwen_cl.training.callbacks.metrics import RunRecorder
from qwen_cl.training.callbacks.resume import LrScheduleFromConfig, RunEndHooksOnResume
from qwen_cl.training.callbacks.samples import RecordSamples
from qwen_cl.training.callbacks.seed import Seed
from qwen_cl.training.callbacks.verify import CheckLossBelowChance, VerifyLogits
from qwen_cl.training.callbacks.vocabulary import MaskPaddedVocabulary
from qwen_cl.training.speed.callback import SpeedOptimizations

VERIFIED_PARAMETERS = 10**9
"""Up to this size, model.verify=auto compares with transformers: a few seconds, and 4 GB of memory at most."""


def build_callbacks(config: RunConfig, architecture: Architecture, output_dir: Path) -> list[run.Config]:
    task = config.training
    flops = training_flops(architecture, adapter_parameters(config.peft, architecture))
    return [
        run.Config(Seed, seed=config.seed),
        run.Config(LrScheduleFromConfig),
        run.Config(RunEndHooksOnResume),
        run.Config(HeartbeatCallback),
        run.Config(SpeedOptimizations, output_dir=str(output_dir), **config.speed.enabled()),
        run.Config(MaskPaddedVocabulary, vocab_size=architecture.vocab_size),
        *_verification(config, architecture, output_dir),
        *_samples(config, output_dir),  # before RunRecorder, which then starts its timer
        run.Config(
            RunRecorder,
            output_dir=str(output_dir),
            log_interval=task.log_interval,
            val_check_interval=task.val_check_interval,
            flops_per_token=flops.per_token,
            flops_per_pair=flops.per_pair,
        ),
        *_adapter(config, output_dir),
    ]


def _adapter(config: RunConfig, output_dir: Path) -> list[run.Config]:
    adapter = adapter_of(config.peft)
    if adapter is None:
        return []
    return [
        run.Config(
            SaveAdapter,
            directory=str(output_dir / "adapter"),
            source=config.model.source,
            base_adapter=config.model.adapter,
            adapter=run.Config(Adapter, **asdict(adapter)),
            on_answers=trains_on_conversations(config),
        )
    ]


def _samples(config: RunConfig, output_dir: Path) -> list[run.Config]:
    task = config.training
    if not task.sample_prompts or isinstance(config.data, MockDataConfig):  # random tokens are not readable
        return []
    prompts, new_tokens = task.sample_prompts, task.sample_tokens
    return [run.Config(RecordSamples, output_dir=str(output_dir), prompts=prompts, new_tokens=new_tokens)]


def _verification(config: RunConfig, architecture: Architecture, output_dir: Path) -> list[run.Config]:
    mode = config.model.verify
    if mode is VerifyMode.none or isinstance(config.data, MockDataConfig):  # the loss of random tokens has no meaning
        return []
    small = count_parameters(expected_shapes(architecture)) <= VERIFIED_PARAMETERS
    readable = not is_nemo_checkpoint(local_directory(config.model.source))  # by transformers
    if mode is VerifyMode.logits or (small and readable):
        precision = config.cluster.precision.value
        return [run.Config(VerifyLogits, config.model.source, config.model.adapter, str(output_dir), precision)]
    return [] if small else [run.Config(CheckLossBelowChance, vocab_size=architecture.vocab_size)]
