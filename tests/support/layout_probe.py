"""The probe that builds Megatron models as a run does, loads them from directories in Hugging Face layout or NeMo 2.0
checkpoints, and saves their logits.

Run by ``tests.support.ranks``. Each rank also writes what it read, by model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qwen_cl.config.run import RunConfig
from qwen_cl.config.store import register_schemas
from qwen_cl.planning.plan import make_plan
from qwen_cl.training.worker import prepare

ROOT = Path(__file__).resolve().parents[2]


def run_config(*overrides: str) -> RunConfig:
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return cast(RunConfig, OmegaConf.to_object(compose("config", ["cluster.accelerator=cpu", *overrides])))


def main(out: Path, tensor_parallel: int, pipeline_parallel: int, directories: list[Path]) -> None:
    layout = [f"cluster.tensor_parallel={tensor_parallel}", f"cluster.pipeline_parallel={pipeline_parallel}"]
    layout += [f"cluster.devices={tensor_parallel * pipeline_parallel}", "task.sequence_length=64"]
    first = run_config("model=local", f"model.source='{directories[0]}'", *layout)
    prepare(make_plan(first).config)
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel)
    model_parallel_cuda_manual_seed(1)
    for directory in directories:
        config = run_config("model=local", f"model.source='{directory}'", *layout)
        _probe(out, directory, config)
    from torch._dynamo.utils import counters

    assert not counters["frames"], "something was compiled, which a laptop may have no compiler for"


def _probe(out: Path, directory: Path, config: RunConfig) -> None:
    import torch
    from safetensors.torch import save_file

    from qwen_cl.models.formats.nemo_layout import is_nemo_checkpoint
    from qwen_cl.models.formats.safetensors import Checkpoint
    from qwen_cl.models.formats.torch_dist import DistributedWeights
    from qwen_cl.models.loading.megatron_shards import fill
    from qwen_cl.models.loading.nemo_shards import fill_from_nemo

    plan = make_plan(config)
    model = build_model(plan)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    checkpoint: Any
    if is_nemo_checkpoint(directory):
        checkpoint = DistributedWeights(directory / "weights")
        sharded = model.sharded_state_dict(prefix="module.")
        fill_from_nemo(sharded, model.named_parameters(), checkpoint, plan.architecture)
    else:
        checkpoint = Checkpoint(directory)
        fill(model.sharded_state_dict(), model.named_parameters(), checkpoint, plan.architecture)
    rank = torch.distributed.get_rank()
    held = sum(parameter.numel() for parameter in model.parameters())
    read = {"bytes_read": checkpoint.bytes_read, "parameters_held": held}
    (out / f"{directory.name}.{rank}.json").write_text(json.dumps(read))
    logits = _logits(model, plan.architecture.hidden_size)
    if logits is not None:
        save_file({"logits": logits[..., : plan.architecture.vocab_size].contiguous()}, out / f"{directory.name}.st")


def build_model(plan: Any) -> Any:
    import fiddle
    from megatron.core import parallel_state

    from qwen_cl.training.model.build import build_model

    cluster = plan.config.cluster
    megatron = fiddle.build(build_model(plan.config, plan.architecture, None).config)
    megatron.tensor_model_parallel_size = cluster.tensor_parallel
    megatron.pipeline_model_parallel_size = cluster.pipeline_parallel
    megatron.pipeline_dtype = megatron.params_dtype
    return megatron.configure_model(
        None, parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    ).eval()


def _logits(model: Any, hidden_size: int) -> Any:
    """Return the logits (batch, sequence, vocabulary) on the first rank of the last stage, else None."""
    import torch
    from megatron.core import parallel_state

    from qwen_cl.patches.cpu_device import without_function_mode

    ids = torch.arange(120).view(2, 60) * 7 % 1400
    with torch.no_grad(), without_function_mode():
        if not parallel_state.is_pipeline_first_stage():
            hidden = torch.empty(60, 2, hidden_size)
            torch.distributed.recv(hidden, src=parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        out = model(input_ids=ids, position_ids=torch.arange(60).expand(2, 60), attention_mask=None)
        if not parallel_state.is_pipeline_last_stage():
            torch.distributed.send(out.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank())
            return None
        parts = [torch.empty_like(out) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_gather(parts, out.contiguous(), group=group)
        return torch.cat(parts, dim=-1) if parallel_state.get_tensor_model_parallel_rank() == 0 else None
