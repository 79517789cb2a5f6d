"""The check of a NeMo 2.0 checkpoint's tensors, saved by any parallel layout. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qwen_cl.config.errors import UserError
from qwen_cl.models.architecture import Architecture
from qwen_cl.models.formats.nemo_layout import WEIGHTS
from qwen_cl.models.formats.torch_dist_metadata import DistributedMetadata
from qwen_cl.models.weight_mapping import (
    LAYER_PREFIX,
    WRAPPER_PREFIX,
    Rule,
    Vocabulary,
    fused_shape,
    layer_rules,
    top_level_rules,
)

DTYPES = ("float32", "bfloat16", "float16")


def check_nemo_tensors(directory: Path, architecture: Architecture) -> None:
    """Compare the tensors in ``.metadata`` with those of the architecture, before anything heavy starts.

    Raises:
        UserError: A tensor is missing, of another shape, incomplete or unused.
    """
    weights = directory / WEIGHTS
    metadata = DistributedMetadata(weights)
    found = {key for key in metadata.keys if not _not_of_the_model(key)}
    if adapters := sorted(key for key in found if ".adapter." in key):
        raise UserError(
            f"{weights} holds an adapter ({adapters[0]}); merge it into its base first (NeMo: llm.peft.merge_lora)"
        )
    expected = dict(_expected(architecture, found))
    if missing := sorted(expected.keys() - found):
        raise UserError(f"{weights} lacks {_some(missing)}, which context/model.yaml requires")
    if unknown := sorted(found - expected.keys()):
        raise UserError(f"{weights} holds {_some(unknown)}, which no layer of this model uses")
    for key, (rule, shape) in expected.items():
        stored = metadata.tensor(key)
        padded = isinstance(rule, Vocabulary) and stored.shape[1:] == shape[1:] and stored.shape[0] > shape[0]
        if stored.shape != shape and not padded:
            raise UserError(
                f"{weights}: tensor {key} has shape {stored.shape} where context/model.yaml requires {shape}"
            )
        if stored.dtype not in DTYPES:
            raise UserError(f"{weights}: tensor {key} is {stored.dtype}; supported: {', '.join(DTYPES)}")


def key_of_layer(key: str, layer: int) -> str:
    """Return the key of a single layer, as some models and versions have it; otherwise Megatron stacks the layers."""
    return key.replace(LAYER_PREFIX, f"{LAYER_PREFIX}{layer}.", 1)


def _expected(architecture: Architecture, found: set[str]) -> Iterator[tuple[str, tuple[Rule, tuple[int, ...]]]]:
    """Yield sharded keys with their rules and shapes, one per layer if the checkpoint does not stack layers."""
    for key, rule in top_level_rules(architecture).items():
        yield WRAPPER_PREFIX + key, (rule, fused_shape(rule, None, architecture))
    layers = range(architecture.num_layers)
    for key, rule in layer_rules(architecture).items():
        name, shape = f"{WRAPPER_PREFIX}{LAYER_PREFIX}{key}", fused_shape(rule, 0, architecture)
        if key_of_layer(name, 0) in found:
            yield from ((key_of_layer(name, layer), (rule, shape)) for layer in layers)
        else:
            yield name, (rule, (len(layers), *shape))


def _not_of_the_model(key: str) -> bool:
    """Return whether a key is optimizer state or Transformer Engine's fp8 state."""
    return "optimizer." in key or "._extra_state" in key


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
