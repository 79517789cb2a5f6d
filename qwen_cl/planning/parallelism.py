"""Parallel sizes that a model allows, and layouts of a number of processes."""

from __future__ import annotations

from qwen_cl.config.cluster import ClusterConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.peft import PeftConfig
from qwen_cl.data.batching import PADDING_MULTIPLE
from qwen_cl.models.adapter_methods import adapter_of
from qwen_cl.models.architecture import Architecture

SHOWN = 12
"""Layouts that a message lists."""


def check_layout(cluster: ClusterConfig, peft: PeftConfig, architecture: Architecture) -> None:
    """Refuse a layout that the model does not allow. Raises UserError with the allowed sizes and layouts."""
    tensor_parallel, pipeline_parallel = cluster.tensor_parallel, cluster.pipeline_parallel
    for what, count in _split_by_rank(architecture).items():
        if count % tensor_parallel:
            raise UserError(
                f"cluster.tensor_parallel ({tensor_parallel}) must divide the model's {what} ({count}); "
                f"this model allows {_joined(tensor_parallel_sizes(architecture))}. {_layouts(cluster, architecture)}"
            )
    if architecture.num_layers % pipeline_parallel:
        raise UserError(
            f"cluster.pipeline_parallel ({pipeline_parallel}) must divide the model's layers "
            f"({architecture.num_layers}); this model allows {_joined(pipeline_parallel_sizes(architecture))}. "
            + _layouts(cluster, architecture)
        )
    adapter = adapter_of(peft)
    if adapter is not None and adapter.rank % tensor_parallel:
        raise UserError(
            f"peft.rank ({adapter.rank}) must be a multiple of cluster.tensor_parallel ({tensor_parallel}), over which "
            "the adapter is split too; change either"
        )
    _check_rows(cluster)


def tensor_parallel_sizes(architecture: Architecture) -> list[int]:
    counts = _split_by_rank(architecture).values()
    return [size for size in range(1, min(counts) + 1) if all(count % size == 0 for count in counts)]


def pipeline_parallel_sizes(architecture: Architecture) -> list[int]:
    layers = architecture.num_layers
    return [size for size in range(1, layers + 1) if layers % size == 0]


def _check_rows(cluster: ClusterConfig) -> None:
    """Check that parallel ranks divide a row, which is always padded to a multiple of PADDING_MULTIPLE."""
    # A context parallel rank has one chunk from each half of a row, which balances attention.
    if PADDING_MULTIPLE % (2 * cluster.context_parallel) and cluster.context_parallel > 1:
        sizes = [size for size in range(1, PADDING_MULTIPLE // 2 + 1) if PADDING_MULTIPLE % (2 * size) == 0]
        raise UserError(
            f"cluster.context_parallel ({cluster.context_parallel}) must divide half of {PADDING_MULTIPLE}, the "
            f"multiple that every row is padded to; it may be {_joined(sizes)}"
        )
    pieces = cluster.tensor_parallel * cluster.context_parallel
    if cluster.sequence_parallel and PADDING_MULTIPLE % pieces:
        raise UserError(
            f"cluster.sequence_parallel splits a row over cluster.tensor_parallel ({cluster.tensor_parallel}) x "
            f"cluster.context_parallel ({cluster.context_parallel}) = {pieces} ranks, which must divide "
            f"{PADDING_MULTIPLE}, the multiple that every row is padded to; write cluster.sequence_parallel=false, "
            "or change the sizes"
        )


def _layouts(cluster: ClusterConfig, architecture: Architecture) -> str:
    """Describe the tensor and pipeline parallel sizes that fit the processes and context parallelism."""
    ranks = cluster.world_size // cluster.context_parallel
    fitting = [
        f"{tensor} x {pipeline}"
        for tensor in tensor_parallel_sizes(architecture)
        for pipeline in pipeline_parallel_sizes(architecture)
        if ranks % (tensor * pipeline) == 0
    ]
    more = ", …" if len(fitting) > SHOWN else ""
    beside = "" if cluster.context_parallel == 1 else f" and context_parallel {cluster.context_parallel}"
    return (
        f"With {cluster.world_size} processes{beside}, tensor_parallel x pipeline_parallel may be "
        f"{', '.join(fitting[:SHOWN])}{more}"
    )


def _joined(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))


def _split_by_rank(architecture: Architecture) -> dict[str, int]:
    """Return the dimensions that tensor parallelism must split evenly. (It pads the vocabulary.)"""
    return {
        "attention heads": architecture.num_attention_heads,
        "KV groups": architecture.num_query_groups,
        "rows of the MLP": architecture.ffn_hidden_size,
    }
