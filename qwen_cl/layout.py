"""Which tensor and pipeline parallel sizes a model can be split into."""

from __future__ import annotations

from qwen_cl.config.errors import UserError
from qwen_cl.source.architecture import Architecture


def check_layout(tensor_parallel: int, pipeline_parallel: int, architecture: Architecture) -> None:
    """Raises UserError where the model cannot be split so, with the sizes it can be split into."""
    for what, count in _split_by_rank(architecture).items():
        if count % tensor_parallel:
            allowed = ", ".join(map(str, tensor_parallel_sizes(architecture)))
            raise UserError(
                f"cluster.tensor_parallel ({tensor_parallel}) must divide the model's {what} ({count}); "
                f"this model allows {allowed}"
            )
    if architecture.num_layers % pipeline_parallel:
        allowed = ", ".join(map(str, pipeline_parallel_sizes(architecture)))
        raise UserError(
            f"cluster.pipeline_parallel ({pipeline_parallel}) must divide the model's layers "
            f"({architecture.num_layers}); this model allows {allowed}"
        )


def tensor_parallel_sizes(architecture: Architecture) -> list[int]:
    counts = _split_by_rank(architecture).values()
    return [size for size in range(1, min(counts) + 1) if all(count % size == 0 for count in counts)]


def pipeline_parallel_sizes(architecture: Architecture) -> list[int]:
    layers = architecture.num_layers
    return [size for size in range(1, layers + 1) if layers % size == 0]


def _split_by_rank(architecture: Architecture) -> dict[str, int]:
    """What tensor parallelism deals out evenly. (The vocabulary it pads.)"""
    return {
        "attention heads": architecture.num_attention_heads,
        "KV groups": architecture.num_query_groups,
        "rows of the MLP": architecture.ffn_hidden_size,
    }
