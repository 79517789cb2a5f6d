"""The mapping between Hugging Face tensors and Megatron tensors, for loading and for export.

Keys are Megatron's *sharded keys*, which do not depend on the layer implementation or the parallel layout
(megatron/core/models/gpt/gpt_layer_specs.py maps the local layers' names to Transformer Engine's). ``{layer}`` is the
global layer number. Sizes are named by fields of the architecture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_cl.models.architecture import Architecture

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Direct:
    """The rule of a tensor that is the same in both layouts."""

    tensor: str
    shape: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The rule of a tensor whose rows Megatron may pad at the end."""

    tensor: str


@dataclass(frozen=True, slots=True)
class QueryKeyValue:
    """The rule of rows interleaved by KV group: that group's query heads, its key head, its value head."""

    kind: str
    """Either "weight" or "bias"."""


@dataclass(frozen=True, slots=True)
class GateUp:
    """The rule of the gate's rows followed by the up projection's, each sharded separately by Megatron."""

    gate: str
    up: str


Rule = Direct | Vocabulary | QueryKeyValue | GateUp

WRAPPER_PREFIX = "module."
"""The prefix of NeMo's Lightning module around Megatron's model."""
LAYER_PREFIX = "decoder.layers."
_LAYER = "model.layers.{layer}."

TOP_LEVEL: dict[str, Rule] = {
    "embedding.word_embeddings.weight": Vocabulary("model.embed_tokens.weight"),
    "decoder.final_layernorm.weight": Direct("model.norm.weight", ("hidden_size",)),
}
OUTPUT_LAYER: dict[str, Rule] = {"output_layer.weight": Vocabulary("lm_head.weight")}

LAYER: dict[str, Rule] = {
    "self_attention.linear_qkv.layer_norm_weight": Direct(_LAYER + "input_layernorm.weight", ("hidden_size",)),
    "self_attention.linear_qkv.weight": QueryKeyValue("weight"),
    "self_attention.linear_proj.weight": Direct(_LAYER + "self_attn.o_proj.weight", ("hidden_size", "query_size")),
    "mlp.linear_fc1.layer_norm_weight": Direct(_LAYER + "post_attention_layernorm.weight", ("hidden_size",)),
    "mlp.linear_fc1.weight": GateUp(_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": Direct(_LAYER + "mlp.down_proj.weight", ("hidden_size", "ffn_hidden_size")),
}
QKV_BIAS: dict[str, Rule] = {"self_attention.linear_qkv.bias": QueryKeyValue("bias")}
QK_NORM: dict[str, Rule] = {
    "self_attention.q_layernorm.weight": Direct(_LAYER + "self_attn.q_norm.weight", ("kv_channels",)),
    "self_attention.k_layernorm.weight": Direct(_LAYER + "self_attn.k_norm.weight", ("kv_channels",)),
}


def layer_rules(architecture: Architecture) -> dict[str, Rule]:
    return LAYER | (QKV_BIAS if architecture.qkv_bias else {}) | (QK_NORM if architecture.qk_norm else {})


def top_level_rules(architecture: Architecture) -> dict[str, Rule]:
    return TOP_LEVEL | ({} if architecture.tied_embeddings else OUTPUT_LAYER)


def rule_for(sharded_key: str, architecture: Architecture) -> Rule:
    """Return the rule of a sharded key.

    Raises:
        KeyError: The family has no rule for it; an unknown tensor must stop the run.
    """
    key = sharded_key.removeprefix(WRAPPER_PREFIX)
    if key.startswith(LAYER_PREFIX):
        return layer_rules(architecture)[key.removeprefix(LAYER_PREFIX)]
    if key == "output_layer.weight" and architecture.tied_embeddings:
        key = "embedding.word_embeddings.weight"
    return top_level_rules(architecture)[key]


def tensor_shapes(rule: Rule, layer: int | None, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a rule's Hugging Face tensors by name, in the rule's order."""
    hidden_size = architecture.hidden_size
    if isinstance(rule, QueryKeyValue):
        sizes = {"q": architecture.query_size, "k": architecture.key_value_size, "v": architecture.key_value_size}
        columns = (hidden_size,) if rule.kind == "weight" else ()
        shapes: dict[str, tuple[int, ...]] = {
            f"{_LAYER}self_attn.{name}_proj.{rule.kind}": (rows, *columns) for name, rows in sizes.items()
        }
    elif isinstance(rule, GateUp):
        shapes = dict.fromkeys((rule.gate, rule.up), (architecture.ffn_hidden_size, hidden_size))
    elif isinstance(rule, Vocabulary):
        shapes = {rule.tensor: (architecture.vocab_size, hidden_size)}
    else:
        shapes = {rule.tensor: tuple(int(getattr(architecture, name)) for name in rule.shape)}
    return {name.format(layer=layer): shape for name, shape in shapes.items()}


def fused_shape(rule: Rule, layer: int | None, architecture: Architecture) -> tuple[int, ...]:
    """Return the shape of Megatron's fused tensor for a rule, without padding."""
    shapes = list(tensor_shapes(rule, layer, architecture).values())
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


def layer_shapes(layer: int, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one layer's Hugging Face tensors by name."""
    rules = layer_rules(architecture).values()
    return {name: shape for rule in rules for name, shape in tensor_shapes(rule, layer, architecture).items()}


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all Hugging Face tensors that a checkpoint of this architecture must hold, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in top_level_rules(architecture).values():
        shapes |= tensor_shapes(rule, None, architecture)
    for layer in range(architecture.num_layers):
        shapes |= layer_shapes(layer, architecture)
    return shapes


def tensor_sources(architecture: Architecture) -> dict[str, tuple[str, int | None, Rule, int]]:
    """Return sharded key, layer, rule and position among the rule's tensors, by Hugging Face name."""
    rules: list[tuple[str, int | None, Rule]] = [
        (key, None, rule) for key, rule in top_level_rules(architecture).items()
    ]
    for layer in range(architecture.num_layers):
        rules += [(LAYER_PREFIX + key, layer, rule) for key, rule in layer_rules(architecture).items()]
    return {
        name: (key, layer, rule, position)
        for key, layer, rule in rules
        for position, name in enumerate(tensor_shapes(rule, layer, architecture))
    }


def count_parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def deliberately_unused(name: str, architecture: Architecture) -> bool:
    """Return whether a tensor, which some checkpoints hold, is derived or shared in this architecture."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and architecture.tied_embeddings)


def split_qkv(fused: torch.Tensor, architecture: Architecture) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value rows of a complete fused tensor of shape (rows, …)."""
    width = architecture.kv_channels
    queries = architecture.num_attention_heads // architecture.num_query_groups
    grouped = fused.view(architecture.num_query_groups, queries + 2, width, *fused.shape[1:])
    query, key, value = grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1]
    return query.flatten(0, 2), key.flatten(0, 1), value.flatten(0, 1)


def split_tensor(
    rule: Rule, full: torch.Tensor, architecture: Architecture, *, by_rank: int = 1
) -> tuple[torch.Tensor, ...]:
    """Split a complete Megatron tensor into the rule's Hugging Face tensors.

    ``by_rank`` is the number of tensor parallel ranks if gate and up rows alternate rank by rank, else 1.
    """
    if isinstance(rule, QueryKeyValue):
        return split_qkv(full, architecture)
    if isinstance(rule, GateUp):
        ranks = full.view(by_rank, 2, -1, *full.shape[1:])
        return ranks[:, 0].flatten(0, 1), ranks[:, 1].flatten(0, 1)
    return (full[: architecture.vocab_size] if isinstance(rule, Vocabulary) else full,)
