"""``task=export``: a run's model as a directory that transformers or PEFT reads, and its upload to the Hub."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from rich.console import Console

from qwen_cl.config.data import FileDataConfig, TextDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.fields import Scope, keys_of
from qwen_cl.config.invocation import Invocation
from qwen_cl.config.overrides import refuse_ignored
from qwen_cl.config.run import RunConfig
from qwen_cl.config.task.export import ExportConfig, ExportDtype, ExportFormat
from qwen_cl.data.chat.settings import write_run_template
from qwen_cl.data.chat.stop_tokens import end_of_turn_tokens, trains_on_conversations
from qwen_cl.data.examples import load_data_tokenizer
from qwen_cl.data.rows import row_files
from qwen_cl.files.atomic_folder import require_room
from qwen_cl.inference.trained_run import Run, find_base, find_run, open_trained, with_hub_settings
from qwen_cl.models.adapter_methods import adapter_of, describe_method
from qwen_cl.models.export.model_card import CardFacts, base_license, model_card
from qwen_cl.models.hub.upload import Target, find_target, upload
from qwen_cl.reporting.console import print_facts
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import State


def export(config: RunConfig, task: ExportConfig, invocation: Invocation) -> None:
    """Export the model that the run of ``task.run`` trained.

    Raises:
        UserError: the run or the output is invalid; nothing was written.
        RunFailed: the upload failed; the exported folder stays.
    """
    accepted = (*keys_of(Scope.access), "dry_run")
    refuse_ignored(invocation.overrides, accepted, "task=export reads the run's settings from its config.yaml")
    run = with_hub_settings(find_run(task.run, task.step), config.model)
    output = _output(task, run.folder)
    if config.model.endpoint is not None:  # huggingface_hub reads its upload endpoint only here, at import
        os.environ["HF_ENDPOINT"] = config.model.endpoint.rstrip("/")
    base = _base(task, run)
    target = find_target(task.push_to, config.model.endpoint, task.format.value) if task.push_to else None
    console = Console()
    print_facts(_facts(task, run, output, target), console)
    if config.dry_run:
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to clean up, as after Ctrl-C
    _write(task, run, base, output)
    print(f"wrote {output}")
    if target is not None:
        commit = upload(target, output)
        print(f"uploaded {target.reference}@{commit} ({'public' if target.public else 'private'})")


def _output(task: ExportConfig, folder: RunFolder) -> Path:
    if task.output is None:
        output = folder.directory / f"export-{task.format.value}"
    else:
        output = Path(os.path.expanduser(task.output)).absolute()  # noqa: PTH111 - Path's raises on an unknown user
    if os.path.lexists(output):
        raise UserError(f"task.output ({output}) exists; choose another folder, or remove it first")
    require_room("task.output", output, 0)
    return output


def _base(task: ExportConfig, run: Run) -> Path | None:
    """Return the base model's directory, or None if the export needs no base weights."""
    is_full = adapter_of(run.config.peft) is None
    if task.format is ExportFormat.adapter and is_full:
        raise UserError(
            "task.format=adapter: this run used full fine-tuning and has no adapter; write task.format=merged"
        )
    if task.format is ExportFormat.adapter or (is_full and task.dtype is not ExportDtype.auto):
        return None
    return find_base(run, "; or set task.dtype, and the base is not needed" if is_full else "")


def _facts(task: ExportConfig, run: Run, output: Path, target: Target | None) -> list[tuple[str, str]]:
    state = run.status.state
    notes = "" if state is State.COMPLETED else f" of a run that is {state or 'without a status'}"
    facts = [("checkpoint", f"step {run.step}{notes}"), ("base", run.config.model.source), ("output", str(output))]
    if run.config.model.adapter is not None:
        facts.insert(2, ("merged adapter", run.config.model.adapter))
    if target is not None:
        facts.append(("upload", f"{target.reference} ({'public' if target.public else 'private'})"))
    return facts


def _write(task: ExportConfig, run: Run, base: Path | None, output: Path) -> None:
    trained = open_trained(run, base)
    from qwen_cl.models.export.merged import MergedModel
    from qwen_cl.models.export.writer import export_adapter, export_merged

    tokenizer = load_data_tokenizer(str(run.folder.tokenizer))
    stops = end_of_turn_tokens(tokenizer) if run.step > 0 and trains_on_conversations(run.config) else []
    card = model_card(_card_facts(task, run), base_license(run.config.model))
    if task.format is ExportFormat.adapter:
        export_adapter(trained, output, card, stops)
        write_run_template(run.config.data, run.folder.tokenizer, output)
    else:
        model = MergedModel(trained, _dtype(task.dtype))
        export_merged(model, output, task.max_shard_size, card, stops, say=lambda line: print(line, flush=True))


def _dtype(dtype: ExportDtype) -> Any:
    import torch

    names = {ExportDtype.fp32: torch.float32, ExportDtype.bf16: torch.bfloat16, ExportDtype.fp16: torch.float16}
    return names.get(dtype)


def _card_facts(task: ExportConfig, run: Run) -> CardFacts:
    data = run.config.data
    files = row_files(data, run.config.task)
    paths = [files.train, files.validation] if files else []
    if isinstance(data, FileDataConfig | TextDataConfig):
        paths = [data.path, data.validation_path]
    names = [path if path.startswith("hf://") else Path(path).name for path in paths if path]
    return CardFacts(
        source=run.config.model.source,
        fingerprint=run.status.model_fingerprint,
        method=describe_method(run.config.peft),
        data=", ".join(names) or "random tokens",
        data_hash=run.status.data_sha256,
        learning_rate=run.config.lr,
        steps=run.step,
        code=run.status.git_commit,
        base_adapter=run.config.model.adapter,
        base_adapter_sha256=run.status.model_adapter_sha256,
        is_adapter=task.format is ExportFormat.adapter,
    )
