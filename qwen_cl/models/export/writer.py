"""The export of a run's checkpoint as a PEFT adapter, or as the complete model with the adapter merged in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from qwen_cl.config.errors import RunFailed
from qwen_cl.files.atomic_folder import atomic_directory, require_room
from qwen_cl.models.config_files import copy_small_files
from qwen_cl.models.export.adapter import combine_adapters, write_adapter
from qwen_cl.models.export.merged import MergedModel, TrainedAdapter, TrainedModel
from qwen_cl.models.formats.tensor_files import INDEX
from qwen_cl.models.generation_config import write_generation_config

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
"""The tokenizer outputs that the models of families.py accept."""
INPUTS_OF_CLASS = {"PreTrainedTokenizerFast": ("input_ids", "token_type_ids", "attention_mask")}
"""The outputs that transformers 4 assumes for a tokenizer whose file names none; 5 has no token_type_ids."""


def export_adapter(trained: TrainedModel, directory: Path, card: str, stops: Sequence[int]) -> None:
    """Write the adapter in PEFT's format.

    Raises:
        UserError: The checkpoint does not hold the adapter that the run's config describes, or the disk is too full.
    """
    assert trained.adapter is not None
    tensors, shape = combine_adapters(TrainedAdapter(trained).tensors(), trained.adapter, trained.base_adapter)
    require_room("task.output", directory, sum(tensor.nbytes for tensor in tensors.values()))
    write_adapter(tensors, shape, trained.source, directory, trained.small_files, stops, card)


def export_merged(
    model: MergedModel,
    directory: Path,
    max_shard_size: str,
    card: str,
    stops: Sequence[int],
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the complete model in Hugging Face layout, with one file of ``max_shard_size`` in memory at a time.

    ``stops`` are the stop tokens that the run trained.

    Raises:
        UserError: The disk is too full, or the checkpoint cannot be read.
        RunFailed: The disk filled up while writing.
    """
    small_files = sum(path.stat().st_size for path in model.trained.small_files.rglob("*") if path.is_file())
    require_room("task.output", directory, model.size + small_files)
    plan = split_torch_state_dict_into_shards(model.tensors, max_shard_size=max_shard_size)
    with atomic_directory(directory) as temporary:
        for number, (file, names) in enumerate(plan.filename_to_tensors.items(), start=1):
            say(f"writing {file} ({number} of {len(plan.filename_to_tensors)})")
            _save({name: model.read(name) for name in names}, temporary / file)
        if plan.is_sharded:
            index = {"metadata": {"total_size": model.size}, "weight_map": plan.tensor_to_filename}
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _write_small_files(model, temporary, stops)
        _leave_out_other_inputs(temporary / "tokenizer_config.json", say)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise RunFailed(f"{path.name} cannot be written: {error}; nothing was left behind") from error


def _write_small_files(model: MergedModel, directory: Path, stops: Sequence[int]) -> None:
    copy_small_files(model.trained.small_files, directory)
    write_generation_config(directory, model.trained.small_files, stops)
    if model.dtype is not None:
        path = directory / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype" if "dtype" in config else "torch_dtype"] = str(model.dtype).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _leave_out_other_inputs(path: Path, say: Callable[[str], None]) -> None:
    """Remove outputs from the tokenizer's config with which ``model.generate(**tokenizer(text))`` would fail."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    of_class = INPUTS_OF_CLASS.get(config.get("tokenizer_class", ""), ())
    named: Sequence[str] = config.get("model_input_names") or of_class
    others = [name for name in named if name not in MODEL_INPUTS]
    if not others:
        return
    config["model_input_names"] = [name for name in named if name in MODEL_INPUTS]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"tokenizer_config.json: model_input_names is without {', '.join(others)}, which the model does not accept")
