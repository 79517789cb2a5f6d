"""Memory estimate of a run, from its shapes alone.

Model state follows Megatron's distributed optimizer: bf16 weights, fp32 gradients, and fp32 masters with Adam's two
moments divided over data parallel ranks. Activations are what autograd saves of one layer without recomputation, as in
arXiv 2205.05198 but for a gated MLP and flash attention. Caching allocators add to it. With the speed optimizations of
``speed=fast`` an H200 used 10 % (LoRA) to 20 % (full fine-tuning) less than estimated (benchmarks/results).
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_cl.config.cluster import ClusterConfig, Precision
from qwen_cl.config.peft import PeftConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.config.speed import LOSS_CHUNK_BYTES, SpeedConfig, When
from qwen_cl.models.adapter_methods import adapter_parameters
from qwen_cl.models.architecture import Architecture
from qwen_cl.models.weight_mapping import count_parameters, expected_shapes, layer_shapes


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """The bytes on the rank that needs most memory."""

    weights: int
    gradients_and_optimizer: int
    activations: int
    trainable_parameters: int
    """Trainable parameters of the model, over all ranks."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients_and_optimizer + self.activations


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The input of one rank in a step."""

    sequence_length: int
    micro_batch_size: int
    micro_batches: int


def batch_shape(config: RunConfig) -> BatchShape:
    task = config.training
    micro_batches = task.global_batch_size // (task.resolved_micro_batch_size * config.cluster.data_parallel)
    return BatchShape(task.sequence_length, task.resolved_micro_batch_size, micro_batches)


def estimate_memory(
    architecture: Architecture,
    batch: BatchShape,
    peft: PeftConfig,
    cluster: ClusterConfig,
    precision: Precision,
    speed: SpeedConfig | None = None,
) -> MemoryEstimate:
    """Estimate the memory of a run. ``speed`` is resolved; None for no speed optimizations."""
    value_bytes = 2 if precision is Precision.bf16 else 4
    layers = architecture.num_layers / cluster.pipeline_parallel
    # The first stage holds the embedding, the last one the head: the same size where they are not tied.
    local = (layers * count_parameters(layer_shapes(0, architecture))) / cluster.tensor_parallel
    local += architecture.vocab_size * architecture.hidden_size / cluster.tensor_parallel
    if not architecture.tied_embeddings and cluster.pipeline_parallel == 1:
        local += architecture.vocab_size * architecture.hidden_size / cluster.tensor_parallel
    adapter = adapter_parameters(peft, architecture)
    trainable = count_parameters(expected_shapes(architecture)) if adapter is None else adapter
    local_trainable = local if adapter is None else adapter / (cluster.tensor_parallel * cluster.pipeline_parallel)
    master_bytes = 4 if precision is Precision.bf16 else 0
    state = local_trainable * (4 + (master_bytes + 8) / (cluster.data_parallel * cluster.context_parallel))
    return MemoryEstimate(
        weights=int(local * value_bytes),
        gradients_and_optimizer=int(state),
        activations=int(_activations(batch, cluster, architecture, value_bytes, speed)),
        trainable_parameters=trainable,
    )


def _activations(
    batch: BatchShape, cluster: ClusterConfig, architecture: Architecture, value_bytes: int, speed: SpeedConfig | None
) -> float:
    tokens = batch.micro_batch_size * batch.sequence_length / cluster.context_parallel
    qkv = architecture.query_size + 2 * architecture.key_value_size
    # Saved per token of one layer: norms, residuals and projections (8 hidden), q, k, v before and after the rotary
    # embedding, and the gated MLP (gate and up, their halves, silu, the product; compiled, gate, up and the product).
    mlp_tensors = 3 if speed is not None and speed.compile is When.always else 7
    per_token = 8 * architecture.hidden_size / (cluster.tensor_parallel if cluster.sequence_parallel else 1)
    per_token += (2 * qkv + mlp_tensors * architecture.ffn_hidden_size) / cluster.tensor_parallel
    in_flight = min(cluster.pipeline_parallel, batch.micro_batches)
    layers = architecture.num_layers / cluster.pipeline_parallel * in_flight
    # Logits in the compute dtype, and their softmax in fp32, saved for the backward pass; or those of one chunk.
    logits = tokens * architecture.vocab_size / cluster.tensor_parallel
    if speed is not None and speed.fused_linear_cross_entropy is When.always:
        logits = min(logits, LOSS_CHUNK_BYTES / value_bytes)
    saved = layers * per_token
    if speed is not None and speed.activation_recompute is When.always:  # each layer's input, and one layer at a time
        saved = layers * architecture.hidden_size / (cluster.tensor_parallel if cluster.sequence_parallel else 1)
        saved += per_token
    return tokens * saved * value_bytes + logits * (value_bytes + 4)
