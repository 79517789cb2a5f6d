"""Capture the forward and backward pass of a micro batch as a CUDA graph, and replay it with one call.

A small model's micro batch has a thousand kernels of a few microseconds, and Python takes as long to launch them.
Megatron's ``enable_cuda_graph`` cannot be used through NeMo 2.7 (its config asserts when it is read a second time), and
its per-layer graphs need Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config, get_model_type

from qwen_cl.training.model.step import Batch, data_step

WARMUP_MICRO_BATCHES = 3
"""Micro batches of a shape before its capture, so that compilation and allocation at first use are done."""


class CudaGraphSchedule:
    """A replacement of ``forward_backward_no_pipelining`` (megatron/core/pipeline_parallel/schedules.py), same results.

    Only one shape is captured, the largest of a run; micro batches of other shapes run without a graph, as all do
    without a GPU.
    """

    def __init__(self, micro_batch_size: int, width: int, segments: int) -> None:
        """Set the shape to capture. ``segments`` is the maximum per packed sequence, to which each batch is padded;
        else 1."""
        self.shape = (micro_batch_size, width)
        self.boundaries = (micro_batch_size * segments + 1,) if segments > 1 else None
        self._seen = 0
        self._captured: _CapturedGraph | None = None

    def __call__(
        self,
        *,
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        num_microbatches: int,
        **others: Any,
    ) -> list[Any]:
        chunk = model[0] if isinstance(model, list) else model
        batches = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
        results = [
            self._run_micro_batch(forward_step_func, batches, chunk, num_microbatches) for _ in range(num_microbatches)
        ]
        config = get_model_config(chunk)
        if config.finalize_model_grads_func is not None:
            tokens = torch.stack([tokens for _, tokens in results]).sum().to(torch.int)
            config.finalize_model_grads_func([chunk], tokens if config.calculate_per_token_loss else None)
        return [reduced for reduced, _ in results]

    def _run_micro_batch(self, step: Any, batches: Iterator[Any], model: Any, count: int) -> tuple[Any, torch.Tensor]:
        batch: Any = {name: value for name, value in data_step(batches).items() if value is not None}
        boundaries = tuple(batch["segments"].shape) if "segments" in batch else None
        if (tuple(batch["tokens"].shape), boundaries) != (self.shape, self.boundaries) or not torch.cuda.is_available():
            return _forward_backward(step, batch, model, count)
        self._seen += 1
        if self._seen <= WARMUP_MICRO_BATCHES:
            return _forward_backward(step, batch, model, count)
        if self._captured is None:
            self._captured = _CapturedGraph(step, batch, model, count)
        return self._captured.replay(batch)


class _CapturedGraph:
    def __init__(self, step: Any, batch: Batch, model: Any, count: int) -> None:
        self.batch = {name: value.clone() for name, value in batch.items()}
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # frees memory for the capture
        self.graph = torch.cuda.CUDAGraph()
        # Megatron caches rotary angles: those of the capture belong to its memory pool.
        RotaryEmbedding.forward.cache_clear()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.reduced, self.tokens = _forward_backward(step, self.batch, model, count)
        RotaryEmbedding.forward.cache_clear()

    def replay(self, batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        for name, value in batch.items():
            self.batch[name].copy_(value)
        self.graph.replay()
        return {name: value.clone() for name, value in self.reduced.items()}, self.tokens.clone()


def _forward_backward(step: Any, batch: Batch, model: Any, count: int) -> tuple[Any, torch.Tensor]:
    reduced: list[Any] = []
    config = get_model_config(model)
    output, tokens = schedules.forward_step(
        step, iter([batch]), model, count, None, reduced, config, cp_group_size=1, is_last_stage=True
    )
    schedules.backward_step(None, output, None, get_model_type(model), config)
    return reduced[0], tokens
