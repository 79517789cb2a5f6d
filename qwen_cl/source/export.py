"""A run's checkpoint as Hugging Face would have it: a PEFT adapter, or the whole model with the adapter merged in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from qwen_cl.config.errors import RunFailed
from qwen_cl.source.adapter import joined, write_adapter
from qwen_cl.source.merged import MergedModel, Trained, TrainedAdapter
from qwen_cl.source.small_files import copy_small_files
from qwen_cl.source.tensor_files import INDEX
from qwen_cl.source.whole_folder import appearing, require_room


def export_adapter(trained: Trained, directory: Path, card: str) -> None:
    """PEFT's format. Raises UserError where the checkpoint holds another adapter than the run's config says."""
    assert trained.adapter is not None
    tensors, shape = joined(TrainedAdapter(trained).tensors(), trained.adapter, trained.base_adapter)
    require_room("task.output", directory, sum(tensor.nbytes for tensor in tensors.values()))
    write_adapter(tensors, shape, trained.source, directory, card)


def export_merged(
    model: MergedModel, directory: Path, max_shard_size: str, card: str, say: Callable[[str], None] = lambda line: None
) -> None:
    """The whole model in Hugging Face layout, in memory one file of ``max_shard_size`` at a time.

    Raises:
        UserError: the disk is too small, or the checkpoint cannot be read.
        RunFailed: the disk filled up after all.
    """
    small_files = sum(path.stat().st_size for path in model.trained.small_files.rglob("*") if path.is_file())
    require_room("task.output", directory, model.size + small_files)
    plan = split_torch_state_dict_into_shards(model.tensors, max_shard_size=max_shard_size)
    with appearing(directory) as temporary:
        for number, (file, names) in enumerate(plan.filename_to_tensors.items(), start=1):
            say(f"writing {file} ({number} of {len(plan.filename_to_tensors)})")
            _save({name: model.read(name) for name in names}, temporary / file)
        if plan.is_sharded:
            index = {"metadata": {"total_size": model.size}, "weight_map": plan.tensor_to_filename}
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _write_small_files(model, temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise RunFailed(f"{path.name} cannot be written: {error}; nothing was left behind") from error


def _write_small_files(model: MergedModel, directory: Path) -> None:
    copy_small_files(model.trained.small_files, directory)
    if model.dtype is not None:
        path = directory / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype" if "dtype" in config else "torch_dtype"] = str(model.dtype).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
