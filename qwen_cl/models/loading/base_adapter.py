"""The ``model.adapter``: a LoRA in PEFT's format that is merged into the frozen base before training.

It is checked from the adapter's files and the base's shapes. No torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.files.hashing import hash_file
from qwen_cl.models.architecture import Architecture
from qwen_cl.models.formats.nemo_layout import is_nemo_checkpoint, tokenizer_directory
from qwen_cl.models.formats.tensor_files import ADAPTER_CONFIG, DTYPES, HEAD, Location, read_header, weights_entry
from qwen_cl.models.tokenizer_checks import tokenizer_hash
from qwen_cl.models.weight_mapping import expected_shapes

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MERGE_FIRST = "merge it with PEFT (merge_and_unload), save the result and name that as model.source"
NOT_RESULT_AFFECTING = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config"),
)
"""Fields of adapter_config.json that do not change the merged weights; fan_in_fan_out is for layers not found here."""
READ = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "init_lora_weights", "bias"),
)
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base's weights unchanged, so that the update applies to the base."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of one weight's update, ``scale`` x ``up`` @ ``down``."""

    down: Location
    """A, (rank, columns)."""
    up: Location
    """B, (rows, rank)."""
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class BaseAdapter:
    """An adapter that is merged into the base."""

    directory: Path
    base: str | None
    """The model it was trained on, according to adapter_config.json."""
    factors: Mapping[str, Factors]
    """The updates by Hugging Face name of the base's tensor."""
    sha256: str


def find_adapter(source: str | None, base: Path, architecture: Architecture) -> BaseAdapter | None:
    """Read ``model.adapter`` and check it against the model in the directory ``base``; None if ``source`` is None.

    Raises:
        UserError: The adapter is missing, of a kind that cannot be merged, or of another model.
    """
    if source is None:
        return None
    adapter = read_adapter(adapter_directory(source))
    if is_nemo_checkpoint(base):
        raise UserError(
            f"model.adapter ({adapter.directory}) needs a model in Hugging Face layout, and model.source ({base}) is a "
            "NeMo 2.0 checkpoint; export or convert that first"
        )
    _check_shapes(adapter, architecture)
    theirs, ours = tokenizer_hash(adapter.directory), tokenizer_hash(tokenizer_directory(base))
    if theirs is not None and ours is not None and theirs != ours:
        raise UserError(
            f"model.adapter ({adapter.directory}) has a tokenizer whose vocabulary, merges or added tokens differ from "
            f"those of {base}; it was trained on other ids. If it was not, remove its tokenizer files"
        )
    return adapter


def adapter_directory(adapter: str) -> Path:
    """Return the adapter's absolute path, as the ranks may start in another directory than the launcher."""
    if adapter.startswith("hf://"):
        name = adapter.removeprefix("hf://").partition("@")[0]
        raise UserError(
            f"model.adapter ({adapter}) must be a directory; fetch it first: hf download {name} --local-dir DIRECTORY"
        )
    return Path(os.path.expanduser(adapter)).absolute()  # noqa: PTH111 - Path's raises on an unknown user


def other_base(adapter: BaseAdapter, source: str) -> str | None:
    """Return the name of the adapter's base if it evidently differs from ``source``, else None."""
    if not adapter.base:
        return None
    names = [name.partition("@")[0].rstrip("/").rpartition("/")[2].lower() for name in (adapter.base, source)]
    return adapter.base if names[0] != names[1] else None


def read_adapter(directory: Path) -> BaseAdapter:
    """Read an adapter in PEFT's format.

    Raises:
        UserError: There is no adapter, or one of a kind that cannot be merged.
    """
    _require_adapter(directory)
    path = directory / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object")
    _refuse_unsupported(config, path)
    base = config.get("base_model_name_or_path")
    factors = _factors(read_header(directory / WEIGHTS), config, directory)
    stamps = tuple((directory / name).stat().st_mtime_ns for name in (ADAPTER_CONFIG, WEIGHTS))
    return BaseAdapter(directory, base if isinstance(base, str) else None, factors, _hash(directory, stamps))


@cache
def _hash(directory: Path, stamps: tuple[int, ...]) -> str:
    """Return the sha256 of both files, computed once per process while their modification times (``stamps``) stay."""
    return hash_file(directory / WEIGHTS, hashlib.sha256((directory / ADAPTER_CONFIG).read_bytes()))


def _require_adapter(directory: Path) -> None:
    where = f"model.adapter ({directory})"
    if not directory.is_dir():
        raise UserError(f"{where} is not a directory; give one with {ADAPTER_CONFIG} and {WEIGHTS}, as PEFT saves them")
    names = {path.name for path in directory.iterdir()}
    if {ADAPTER_CONFIG, WEIGHTS} <= names:
        return
    if (directory / "adapter" / ADAPTER_CONFIG).is_file():
        raise UserError(f"{where} is a folder with an adapter in it; write model.adapter={directory / 'adapter'}")
    if "adapter_metadata.json" in names or (directory / "weights/adapter_metadata.json").is_file():
        raise UserError(f"{where} is a checkpoint; export the run's adapter first: task=export task.format=adapter")
    if ADAPTER_CONFIG in names:
        found = " (found adapter_model.bin, which is pickled)" if "adapter_model.bin" in names else ""
        raise UserError(f"{where} has no {WEIGHTS}{found}; save the adapter again with PEFT, as safetensors")
    if weights_entry(names):
        raise UserError(f"{where} is a model, not an adapter; write model.source={directory}")
    raise UserError(f"{where} holds no {ADAPTER_CONFIG}; give a directory as PEFT saves an adapter")


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type ({config.get('peft_type')}) is not supported, only LORA; {MERGE_FIRST}")
    if config.get("bias") not in (None, "none"):
        raise UserError(f"{path}: bias ({config['bias']}) is not supported, only none; {MERGE_FIRST}")
    if config.get("init_lora_weights") not in PLAIN_INITS:
        raise UserError(
            f"{path}: init_lora_weights ({config['init_lora_weights']}) changed the base's weights; {MERGE_FIRST}"
        )
    for field, value in config.items():
        if value and field not in (*NOT_RESULT_AFFECTING, *READ):
            raise UserError(f"{path}: {field} ({json.dumps(value)}) is not supported; {MERGE_FIRST}")
    for field in ("r", "lora_alpha"):
        value = config.get(field)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(f"{path}: {field} ({json.dumps(value)}) must be a positive number")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise UserError(f"{path}: {field} ({json.dumps(config[field])}) must be an object")


def _factors(header: Mapping[str, Location], config: Mapping[str, Any], directory: Path) -> dict[str, Factors]:
    found: dict[str, dict[str, Location]] = {}
    path = directory / WEIGHTS
    for name, location in header.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise UserError(f"{path} holds {name}, which is not a LoRA tensor of a linear layer; {MERGE_FIRST}")
        if location.dtype not in DTYPES:
            raise UserError(f"{path}: tensor {name} is {location.dtype}; it must be {', '.join(DTYPES)}")
        found.setdefault(match[1], {})[match[2]] = location
    if not found:
        raise UserError(f"{path} holds no adapter tensors")
    factors = {}
    for module, parts in found.items():
        if missing := sorted({"A", "B"} - parts.keys()):
            raise UserError(f"{path} lacks {PREFIX}{module}.lora_{missing[0]}.weight")
        if not _is_target(module, config.get("target_modules")):
            raise UserError(f"{path} holds {module}, which target_modules in {ADAPTER_CONFIG} does not name")
        down, up = parts["A"], parts["B"]
        rank = _of_module("rank_pattern", config["r"], module, config, directory)
        if len(down.shape) != 2 or len(up.shape) != 2 or not down.shape[0] == up.shape[1] == rank:
            raise UserError(
                f"{path}: lora_A {down.shape} and lora_B {up.shape} of {module} are not of rank {rank}, the rank in "
                f"{ADAPTER_CONFIG}"
            )
        alpha = _of_module("alpha_pattern", config["lora_alpha"], module, config, directory)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        factors[f"{module}.weight"] = Factors(down, up, scale)
    return factors


def _is_target(module: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in targets or ())


def _of_module(field: str, default: float, module: str, config: Mapping[str, Any], directory: Path) -> float:
    """Return the module's value in a pattern field: the first pattern that matches the end of its name, as in PEFT
    (peft.utils.get_pattern_key)."""
    for pattern, value in (config.get(field) or {}).items():
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise UserError(
                f"{directory / ADAPTER_CONFIG}: {field} ({pattern}) is not a regular expression: {error}"
            ) from error
        if matched:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise UserError(f"{directory / ADAPTER_CONFIG}: {field}.{pattern} ({value}) must be a positive number")
            return value
    return default


def _check_shapes(adapter: BaseAdapter, architecture: Architecture) -> None:
    shapes = expected_shapes(architecture)
    for name, factors in adapter.factors.items():
        module = name.removesuffix(".weight")
        where = f"model.adapter ({adapter.directory})"
        if name == HEAD and architecture.tied_embeddings:
            raise UserError(f"{where} changes lm_head, which this base shares with its embedding; {MERGE_FIRST}")
        if name not in shapes:
            raise UserError(f"{where} changes {module}, which the base lacks: it was trained on another model")
        if "embed_tokens" in name:
            raise UserError(f"{where} changes the embedding, which is not supported; {MERGE_FIRST}")
        shape = (factors.up.shape[0], factors.down.shape[1])
        if shape != shapes[name]:
            raise UserError(
                f"{where} has an update of shape {shape} for {module}, which is {shapes[name]} in the base: it was "
                "trained on another model"
            )
