"""The imports of all probes, which ``tests.support.ranks`` forks from a process that has loaded them."""

from __future__ import annotations

import gc
import os

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from qwen_cl.training.setup import prepare

prepare(cpu=True)

import nemo.collections.llm  # noqa: E402, F401
import torch.distributed.checkpoint  # noqa: E402, F401
import transformers.models.auto.modeling_auto  # noqa: E402, F401

import qwen_cl.training.callbacks.adapter  # noqa: E402
import qwen_cl.training.callbacks.checkpoint  # noqa: E402
import qwen_cl.training.callbacks.verify  # noqa: E402, F401

gc.freeze()
