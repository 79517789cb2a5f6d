"""Which Hugging Face tensors make up which Megatron tensor; the one table for loading and for export.

Keys are Megatron's *sharded keys*, which do not depend on the layer implementation or the parallel layout
(megatron/core/models/gpt/gpt_layer_specs.py maps the local layers' names onto Transformer Engine's). ``{layer}`` is
the global layer number.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_cl.source.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Whole:
    """One tensor, the same shape on both sides."""

    tensor: str


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One tensor whose rows Megatron may pad at the end."""

    tensor: str


@dataclass(frozen=True, slots=True)
class QueryKeyValue:
    """Rows interleaved by KV group: that group's query heads, its key head, its value head."""

    query: str
    key: str
    value: str


@dataclass(frozen=True, slots=True)
class GateUp:
    """The gate's rows, then the up projection's; Megatron shards each of the two by itself."""

    gate: str
    up: str


Rule = Whole | Vocabulary | QueryKeyValue | GateUp

WRAPPER_PREFIX = "module."
"""NeMo's Lightning module around Megatron's model."""
LAYER_PREFIX = "decoder.layers."
_LAYER = "model.layers.{layer}."


def _qkv(kind: str) -> QueryKeyValue:
    return QueryKeyValue(*(f"{_LAYER}self_attn.{name}_proj.{kind}" for name in "qkv"))


QWEN2: dict[str, Rule] = {
    "embedding.word_embeddings.weight": Vocabulary("model.embed_tokens.weight"),
    "output_layer.weight": Vocabulary("lm_head.weight"),
    "decoder.final_layernorm.weight": Whole("model.norm.weight"),
    "self_attention.linear_qkv.layer_norm_weight": Whole(_LAYER + "input_layernorm.weight"),
    "self_attention.linear_qkv.weight": _qkv("weight"),
    "self_attention.linear_qkv.bias": _qkv("bias"),
    "self_attention.linear_proj.weight": Whole(_LAYER + "self_attn.o_proj.weight"),
    "mlp.linear_fc1.layer_norm_weight": Whole(_LAYER + "post_attention_layernorm.weight"),
    "mlp.linear_fc1.weight": GateUp(_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": Whole(_LAYER + "mlp.down_proj.weight"),
}

TOP_LEVEL = ("embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight")


def rule_for(sharded_key: str, architecture: Architecture) -> Rule:
    """The rule of a sharded key. KeyError if the family has none: a tensor nobody knows must stop the run."""
    key = sharded_key.removeprefix(WRAPPER_PREFIX).removeprefix(LAYER_PREFIX)
    if key == "output_layer.weight" and architecture.tied_embeddings:
        return QWEN2["embedding.word_embeddings.weight"]
    return QWEN2[key]


def tensors_of(rule: Rule, layer: int | None) -> tuple[str, ...]:
    if isinstance(rule, QueryKeyValue):
        names: tuple[str, ...] = (rule.query, rule.key, rule.value)
    elif isinstance(rule, GateUp):
        names = (rule.gate, rule.up)
    else:
        names = (rule.tensor,)
    return tuple(name.format(layer=layer) for name in names)


def expected_tensors(architecture: Architecture) -> set[str]:
    """Every Hugging Face tensor a checkpoint of this architecture must hold."""
    names: set[str] = set()
    for key, rule in QWEN2.items():
        if key == "output_layer.weight" and architecture.tied_embeddings:
            continue
        top_level = key in TOP_LEVEL
        for layer in (None,) if top_level else range(architecture.num_layers):
            names.update(tensors_of(rule, layer))
    return names


def deliberately_unused(name: str, architecture: Architecture) -> bool:
    """Tensors some checkpoints carry that this architecture derives or shares."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and architecture.tied_embeddings)
