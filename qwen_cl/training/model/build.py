"""Build NeMo's model class of a family from the architecture that a config.json describes."""

from __future__ import annotations

from typing import Any

import nemo_run as run
import torch
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import HAVE_TE
from nemo.collections.llm.gpt.model.llama import Llama31Config

from qwen_cl.config.cluster import Accelerator, Precision
from qwen_cl.config.run import RunConfig
from qwen_cl.models.architecture import Architecture
from qwen_cl.training.model.attention import layer_spec, segment_layer_spec
from qwen_cl.training.model.step import data_step, forward_step


def build_model(config: RunConfig, architecture: Architecture, tokenizer: run.Config) -> run.Config:
    family = architecture.family
    model, model_config = getattr(llm, family.nemo_model), getattr(llm, family.nemo_config)
    fields = _shape(architecture, config.cluster.tensor_parallel)
    if scaling := architecture.rope_scaling:
        model_config = Llama31Config
        fields.update(
            scale_factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            old_context_len=scaling.original_max_position_embeddings,
        )
    if family.nemo_window:
        fields.update(window_size=None, cp_comm_type=None)  # sequences are limited to the window (plan.py)
    if config.cluster.pipeline_parallel > 1:
        # Micro batches are padded to their longest sequence, so stages exchange shapes; Megatron requires this
        # dispatcher for that, even without experts.
        fields.update(variable_seq_lengths=True, moe_token_dispatcher_type="alltoall")
    return run.Config(model, config=run.Config(model_config, **fields, **_execution(config)), tokenizer=tokenizer)


def leave_unset(tensor: torch.Tensor) -> torch.Tensor:
    """Skip Megatron's random initialization: the weights are read from a file before their first use."""
    return tensor


def _shape(architecture: Architecture, tensor_parallel: int) -> dict[str, Any]:
    return {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.kv_channels,
        "vocab_size": -(-architecture.vocab_size // tensor_parallel) * tensor_parallel,
        "layernorm_epsilon": architecture.layernorm_epsilon,
        "rotary_base": architecture.rotary_base,
        "init_method_std": architecture.init_method_std,
        "share_embeddings_and_output_weights": architecture.tied_embeddings,
        "add_qkv_bias": architecture.qkv_bias,
        "qk_layernorm": architecture.qk_norm,
    }


def _execution(config: RunConfig) -> dict[str, Any]:
    fp32 = config.cluster.precision is Precision.fp32
    return {
        "seq_length": config.training.sequence_length,
        "transformer_layer_spec": segment_layer_spec if config.training.is_packed else layer_spec,
        "forward_step_fn": forward_step,
        "data_step_fn": data_step,
        "calculate_per_token_loss": True,  # each token weighs the same in every micro batch
        "cross_entropy_loss_fusion": not fp32,  # its backward always casts gradients to bf16
        "apply_rope_fusion": HAVE_TE,
        "persist_layer_norm": False,  # not supported by torch's norms
        # Random initialization takes longer than loading, and loading is checked to set all of them.
        **dict.fromkeys(("init_method", "output_layer_init_method", "embedding_init_method"), leave_unset),
        "use_cpu_initialization": config.cluster.accelerator is Accelerator.cpu,
        "params_dtype": torch.float32 if fp32 else torch.bfloat16,
        "bf16": not fp32,
    }
