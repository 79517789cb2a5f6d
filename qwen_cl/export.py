"""``task=export``: from a run's folder to a directory transformers or PEFT reads, and to the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.config.file import load_config
from qwen_cl.config.schema import DoraConfig, LoraConfig, RunConfig
from qwen_cl.config.tasks import HUB_NAME, ExportConfig, ExportDtype, ExportFormat
from qwen_cl.run_folder import RunFolder

STEP = re.compile(r"step=(\d+)")


def export(task: ExportConfig) -> None:
    """Raises UserError where the run or the output is not what it must be; nothing is left half-written."""
    folder = RunFolder(Path(task.run).expanduser())
    config = _run_config(folder, task)
    step, checkpoint = _checkpoint(folder, task)
    output = Path(task.output).expanduser().absolute() if task.output else _default_output(folder, task)
    if output.exists():
        raise UserError(f"task.output ({output}) exists; choose another folder, or remove it first")
    _require_upload_possible(task)
    print(f"reading {checkpoint}", flush=True)
    _write(task, config, folder, step, checkpoint, output)
    print(f"wrote {output}")
    if task.push_to:
        _push(task.push_to, output)


def _default_output(folder: RunFolder, task: ExportConfig) -> Path:
    return folder.directory / f"export-{task.format.value}"


def _run_config(folder: RunFolder, task: ExportConfig) -> RunConfig:
    if not folder.config.is_file():
        raise UserError(f"task.run ({folder.directory}) is not the folder of a run: it has no config.yaml")
    return load_config(folder.config)


def _checkpoint(folder: RunFolder, task: ExportConfig) -> tuple[int, Path]:
    found = {
        int(match[1]): path / "weights"
        for path in folder.checkpoints.glob("step=*")
        if (match := STEP.fullmatch(path.name))
    }
    if not found:
        raise UserError(f"task.run ({folder.directory}) has no checkpoint in checkpoints/; nothing can be exported")
    step = max(found) if task.step is None else task.step
    if step not in found:
        raise UserError(f"task.step ({task.step}) has no checkpoint in {folder.checkpoints}; there are {sorted(found)}")
    return step, found[step]


def _write(task: ExportConfig, config: RunConfig, folder: RunFolder, step: int, checkpoint: Path, output: Path) -> None:
    from qwen_cl.megatron.imports import import_megatron

    import_megatron()
    from qwen_cl.source.export import export_adapter, export_merged

    trained = _trained(config, checkpoint)
    if task.format is ExportFormat.adapter:
        export_adapter(trained, output)
    else:
        card = model_card(config, folder.status(), step)
        export_merged(trained, output, _dtype(task.dtype), task.max_shard_size, card)


def _trained(config: RunConfig, checkpoint: Path) -> Any:
    from qwen_cl.source.adapter import AdapterShape
    from qwen_cl.source.architecture import read_architecture
    from qwen_cl.source.distributed import DistributedWeights
    from qwen_cl.source.export import Trained
    from qwen_cl.source.reference import resolve
    from qwen_cl.source.settings import HubSettings

    model = resolve(config.model.source, HubSettings.of(config.model))
    peft = config.peft
    shape = None
    if isinstance(peft, LoraConfig):
        shape = AdapterShape(
            rank=peft.rank,
            alpha=peft.alpha,
            dropout=peft.dropout,
            target_modules=list(peft.target_modules),
            dora=isinstance(peft, DoraConfig),
        )
    return Trained(
        weights=DistributedWeights(checkpoint),
        base=model.directory,
        source=model.source,
        architecture=read_architecture(model.config, model.directory),
        adapter=shape,
        tensor_parallel=config.cluster.tensor_parallel,
    )


def _dtype(dtype: ExportDtype) -> Any:
    import torch

    names = {ExportDtype.fp32: torch.float32, ExportDtype.bf16: torch.bfloat16, ExportDtype.fp16: torch.float16}
    return names.get(dtype)


def model_card(config: RunConfig, status: dict[str, Any], step: int) -> str:
    """What a reader must know before using the weights, with the front matter the Hub indexes."""
    base, _, commit = config.model.source.removeprefix("hf://").partition("@")
    peft = type(config.peft).__name__.removesuffix("Config").replace("Peft", "none (every weight was trained)")
    front_matter = f"base_model: {base}\n" if config.model.source.startswith("hf://") else ""
    return f"""---
{front_matter}library_name: transformers
tags: [qwen_cl]
---
# {base.rsplit("/", 1)[-1]}, adapted

| | |
|---|---|
| base model | {base} |
| commit of the base | {commit or "none: a local directory"} |
| licence | that of the base model; read its card before you publish this |
| method | {peft}, learning rate {config.lr:g} |
| data, sha256 | {status.get("data_hash") or "random tokens"} |
| optimizer steps | {step} |
| code | {status.get("git_commit") or "unknown"} |
"""


def _require_upload_possible(task: ExportConfig) -> None:
    """Before minutes of writing: a token that the Hub takes."""
    if task.push_to is None:
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
    from requests.exceptions import RequestException

    try:
        HfApi().whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, RequestException) as error:
        raise UserError(
            f"task.push_to ({task.push_to}): the Hub did not accept a login ({type(error).__name__}); `hf auth login` "
            "or HF_TOKEN with write access, and a network"
        ) from error


def _push(target: str, output: Path) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from requests.exceptions import RequestException

    match = HUB_NAME.fullmatch(target)
    assert match is not None
    try:
        HfApi().create_repo(match["repo"], exist_ok=True, private=True)
        commit = HfApi().upload_folder(repo_id=match["repo"], folder_path=str(output))
    except (HfHubHTTPError, RequestException) as error:
        raise UserError(f"task.push_to ({target}): {error}; {output} is whole, upload it again") from error
    print(f"uploaded {target} at {commit.oid} (private; make it public on its page)")
