"""The writer of NeMo 2.0 checkpoints with NeMo's own classes, from models in Hugging Face layout.

Run by ``tests.support.ranks`` with the path of a JSON file that lists {"model": a directory, "tokenizer": what NeMo's
tokenizer is made of, "config": NeMo's class, "fields": what NeMo's importer would set besides the shape, "to": where,
"layout": [tensor parallel, pipeline parallel], "layers_apart": whether each layer has keys of its own}.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tests.support.layout_probe import run_config


def main(specification: Path) -> None:
    from qwen_cl.training.worker import prepare

    config = run_config("model=tiny", "cluster.precision=fp32")
    prepare(config)
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    for one in json.loads(specification.read_text()):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(*one["layout"])
        model_parallel_cuda_manual_seed(1)
        _write(one, *one["layout"])


def _write(one: dict[str, Any], tensor_parallel: int, pipeline_parallel: int) -> None:
    import torch
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.lightning.io.pl import MegatronCheckpointIO, TrainerContext

    from qwen_cl.models.architecture import read_architecture
    from qwen_cl.models.formats.safetensors import Checkpoint
    from qwen_cl.models.loading.megatron_shards import fill
    from qwen_cl.models.reference import read_model_config

    source, target = Path(one["model"]), Path(one["to"])
    published = read_model_config(source)
    architecture = read_architecture(published, source)
    tokenizer = AutoTokenizer(one["tokenizer"])
    config = getattr(llm, one["config"])(**_shape(published), **one["fields"])
    model = getattr(llm, architecture.family.nemo_model)(config, tokenizer=tokenizer)
    trainer = nl.Trainer(
        devices=tensor_parallel * pipeline_parallel,
        accelerator="cpu",
        strategy=nl.MegatronStrategy(
            tensor_model_parallel_size=tensor_parallel,
            pipeline_model_parallel_size=pipeline_parallel,
            pipeline_dtype=torch.float32,
        ),
    )
    trainer.strategy.connect(model)
    core = _configure(config, tokenizer, tensor_parallel, pipeline_parallel)
    sharded = core.sharded_state_dict(prefix="module.")
    fill(sharded, core.named_parameters(), Checkpoint(source), architecture)
    # The same parameters, under the keys that some models and versions use.
    sharded = core.sharded_state_dict(prefix="module.", metadata={"non_homogeneous_layers": one["layers_apart"]})
    MegatronCheckpointIO(save_ckpt_format="torch_dist").save_checkpoint({"sharded_state_dict": sharded}, target)
    if torch.distributed.get_rank() == 0:
        TrainerContext.from_trainer(trainer).io_dump(target / "context", yaml_attrs=["model"])


def _shape(published: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that NeMo's importers read from a config.json."""
    return {
        "num_layers": published["num_hidden_layers"],
        "hidden_size": published["hidden_size"],
        "ffn_hidden_size": published["intermediate_size"],
        "num_attention_heads": published["num_attention_heads"],
        "num_query_groups": published["num_key_value_heads"],
        "kv_channels": published["head_dim"],
        "init_method_std": published["initializer_range"],
        "layernorm_epsilon": published["rms_norm_eps"],
        "rotary_base": published["rope_theta"],
        "share_embeddings_and_output_weights": published["tie_word_embeddings"],
        "seq_length": published["max_position_embeddings"],
    }


def _configure(config: Any, tokenizer: Any, tensor_parallel: int, pipeline_parallel: int) -> Any:
    """Configure the live model for this machine; the context is written from the user's settings."""
    import torch
    from megatron.core import parallel_state

    from qwen_cl.training.model.attention import layer_spec

    live = copy.copy(config)
    live.transformer_layer_spec = layer_spec
    live.tensor_model_parallel_size, live.pipeline_model_parallel_size = tensor_parallel, pipeline_parallel
    live.params_dtype = live.pipeline_dtype = torch.float32
    live.apply_rope_fusion = live.persist_layer_norm = live.gradient_accumulation_fusion = False
    live.use_cpu_initialization = True
    return live.configure_model(
        tokenizer, parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    )
