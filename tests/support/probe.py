"""The probe that trains a run folder's config for a few steps and saves the Megatron model's logits.

Run by ``tests.support.ranks``. Adapters are disturbed first, so that a wrong export cannot
hide behind weights that are still zero; the checkpoint of step 0 is from before that, and from before any training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_cl.config.saved import load_config
from qwen_cl.config.store import register_schemas
from qwen_cl.runs.folder import RunFolder
from qwen_cl.training.worker import load_recipe, prepare
from tests.support.exporting import seal


def main(directory: Path) -> None:
    register_schemas()
    folder = RunFolder(directory)
    config = load_config(folder.config)
    prepare(config)
    import lightning.pytorch as pl
    import torch
    from safetensors.torch import save_file

    from qwen_cl.training.callbacks.base import RunContext, build_bound

    class Probe(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 0:
                trainer.save_checkpoint(str(folder.checkpoints / "step=0"), weights_only=True)
                trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)
                torch.distributed.barrier()
                if trainer.is_global_zero:
                    seal(folder.checkpoints / "step=0")
                _disturb_adapters(trainer.strategy.megatron_parallel)
                for optimizer in trainer.strategy.optimizers:
                    optimizer.reload_model_params()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            model = trainer.strategy.megatron_parallel.eval()
            ids = torch.arange(48).view(2, 24) * 7 % 1400
            logits = _logits(model[0], ids)
            if logits is not None:
                save_file({"ids": ids, "logits": logits.contiguous()}, str(directory / "probe.safetensors"))

    task = build_bound(load_recipe(config, folder), RunContext())
    task.keywords["trainer"].callbacks.insert(0, Probe())
    task()


def _disturb_adapters(model: Any) -> None:
    """Disturb the adapters, alike on ranks that hold the same tensor and differently where each holds a part."""
    import torch
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    alike, apart = (torch.Generator().manual_seed(seed) for seed in (0, 1 + rank))
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            generator = apart if getattr(parameter, "tensor_model_parallel", False) else alike
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _logits(model: Any, ids: Any) -> Any:
    """Return the logits (batch, sequence, padded vocabulary) on the first rank of the last stage, else None."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.utils import get_model_config, unwrap_model

    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    with torch.no_grad():
        if not parallel_state.is_pipeline_first_stage():
            hidden = torch.empty(ids.shape[1], ids.shape[0], get_model_config(model).hidden_size)
            torch.distributed.recv(hidden, src=parallel_state.get_pipeline_model_parallel_prev_rank())
            unwrap_model(model).set_input_tensor(hidden)
        out = model(input_ids=ids, position_ids=positions, attention_mask=None)
        if not parallel_state.is_pipeline_last_stage():
            torch.distributed.send(out.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank())
            return None
        parts = [torch.empty_like(out) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
        torch.distributed.all_gather(parts, out.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        return torch.cat(parts, dim=-1) if parallel_state.get_tensor_model_parallel_rank() == 0 else None
