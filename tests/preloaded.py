"""What every probe imports, imported once: ``tests.ranks`` forks them from a process that has."""

from __future__ import annotations

import gc
import os

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from qwen_cl.megatron import prepare

prepare(cpu=True)

import nemo.collections.llm  # noqa: E402, F401
import torch.distributed.checkpoint  # noqa: E402, F401
import transformers.models.auto.modeling_auto  # noqa: E402, F401

import qwen_cl.callbacks  # noqa: E402
import qwen_cl.recipe  # noqa: E402
import qwen_cl.saving  # noqa: E402
import qwen_cl.verification  # noqa: E402, F401

gc.freeze()
