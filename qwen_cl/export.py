"""``task=export``: from a run's folder to a directory transformers or PEFT reads, and to the Hub."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qwen_cl.config.errors import UserError
from qwen_cl.config.schema import DoraConfig, LoraConfig, ModelConfig, PeftConfig, RunConfig
from qwen_cl.config.tasks import ExportConfig, ExportDtype, ExportFormat
from qwen_cl.data.rows import row_files
from qwen_cl.run_folder import RunFolder, State
from qwen_cl.source.card import CardFacts, licence_of, model_card
from qwen_cl.source.fingerprint import fingerprint
from qwen_cl.source.reference import is_hub_reference, read_model_config, resolve
from qwen_cl.source.settings import HubSettings
from qwen_cl.source.upload import Target, find_target, upload
from qwen_cl.source.whole_folder import require_room
from qwen_cl.trained_run import Run, find_run
from qwen_cl.view import print_facts

if TYPE_CHECKING:
    from qwen_cl.source.merged import Trained

TAKEN = ("model.endpoint", "model.offline", "model.cache", "dry_run")
"""Keys outside the group task that are not the run's own."""


def export(config: RunConfig, task: ExportConfig, overrides: list[str]) -> None:
    """``overrides`` are the user's own words.

    Raises:
        UserError: the run or the output is not what it must be; nothing was written.
        RunFailed: the upload failed; the exported folder stays.
    """
    refuse_ignored(overrides)
    run = _with_hub_settings(find_run(task), config.model)
    output = _output(task, run.folder)
    if config.model.endpoint is not None:  # huggingface_hub takes what it uploads to from here alone, at its import
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


def refuse_ignored(overrides: list[str]) -> None:
    """A key that would change nothing must not look as if it did."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].partition("@")[0]
        if key not in TAKEN and key.partition(".")[0] not in ("task", "hydra"):
            raise UserError(
                f"{override} would change nothing: task=export takes what a run is from its own config.yaml; remove it"
            )


def _with_hub_settings(run: Run, now: ModelConfig) -> Run:
    """The base comes from where the run had it, unless the user says otherwise now."""
    then = run.config.model
    model = replace(
        then,
        endpoint=now.endpoint or then.endpoint,
        offline=now.offline or then.offline,
        cache=now.cache or then.cache,
    )
    return replace(run, config=replace(run.config, model=model))


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
    """The base model's directory, its weights present; None where none of them is needed.

    Raises:
        UserError: it is out of reach, or not what the run was trained from.
    """
    source, is_full = run.config.model.source, not isinstance(run.config.peft, LoraConfig)
    if task.format is ExportFormat.adapter and is_full:
        raise UserError("task.format=adapter: this run trained every weight and has none; write task.format=merged")
    if task.format is ExportFormat.adapter or (is_full and task.dtype is not ExportDtype.auto):
        return None
    if is_hub_reference(source):
        return resolve(source, HubSettings.of(run.config.model)).directory
    fix = "; name task.dtype and it is not needed" if is_full else ""
    if not Path(source).is_dir():
        raise UserError(f"the base model of this run, {source}, is gone; put it back{fix}")
    recorded = run.status.get("model_fingerprint")
    if recorded is None:
        print(f"note: this run did not record what {source} held; it is taken to be unchanged")
    elif fingerprint(Path(source)) != recorded:
        raise UserError(
            f"the base model of this run, {source}, has changed since: an export would mix two models; put it back{fix}"
        )
    return Path(source)


def _facts(task: ExportConfig, run: Run, output: Path, target: Target | None) -> list[tuple[str, str]]:
    state = run.status.get("state")
    notes = "" if state == State.COMPLETED else f" of a run that is {state or 'without a status'}"
    facts = [("checkpoint", f"step {run.step}{notes}"), ("base", run.config.model.source), ("output", str(output))]
    if target is not None:
        facts.append(("upload", f"{target.reference} ({'public' if target.public else 'private'})"))
    return facts


def _write(task: ExportConfig, run: Run, base: Path | None, output: Path) -> None:
    _import_quietly()
    from qwen_cl.source.export import export_adapter, export_merged
    from qwen_cl.source.merged import MergedModel

    trained = _trained(run, base)
    card = model_card(_card_facts(task, run), licence_of(run.config.model))
    if task.format is ExportFormat.adapter:
        export_adapter(trained, output, card)
    else:
        model = MergedModel(trained, _dtype(task.dtype))
        export_merged(model, output, task.max_shard_size, card, say=lambda line: print(line, flush=True))


def _import_quietly() -> None:
    """What torch and Megatron say of themselves while they are imported is no news to a user."""
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from qwen_cl.megatron.imports import import_megatron

        import_megatron()
        import qwen_cl.source.export  # noqa: F401


def _trained(run: Run, base: Path | None) -> Trained:
    from qwen_cl.source.adapter import AdapterShape
    from qwen_cl.source.architecture import read_architecture
    from qwen_cl.source.distributed import DistributedWeights
    from qwen_cl.source.merged import Trained

    peft, adapter = run.config.peft, None
    if isinstance(peft, LoraConfig):
        adapter = AdapterShape(
            rank=peft.rank,
            alpha=peft.alpha,
            dropout=peft.dropout,
            target_modules=list(peft.target_modules),
            dora=isinstance(peft, DoraConfig),
        )
    return Trained(
        weights=DistributedWeights(run.weights),
        source=run.config.model.source,
        base=base,
        small_files=run.folder.tokenizer,
        architecture=read_architecture(read_model_config(run.folder.tokenizer), run.folder.tokenizer),
        adapter=adapter,
        tensor_parallel=run.config.cluster.tensor_parallel,
    )


def _dtype(dtype: ExportDtype) -> Any:
    import torch

    names = {ExportDtype.fp32: torch.float32, ExportDtype.bf16: torch.bfloat16, ExportDtype.fp16: torch.float16}
    return names.get(dtype)


def _card_facts(task: ExportConfig, run: Run) -> CardFacts:
    files = row_files(run.config.data, run.config.task)
    names = [Path(name).name for name in (files.train, files.validation) if name] if files else []
    return CardFacts(
        source=run.config.model.source,
        fingerprint=run.status.get("model_fingerprint"),
        method=_method(run.config.peft),
        data=", ".join(names) or "random tokens",
        data_hash=run.status.get("data_hash"),
        learning_rate=run.config.lr,
        steps=run.step,
        code=run.status.get("git_commit"),
        is_adapter=task.format is ExportFormat.adapter,
    )


def _method(peft: PeftConfig) -> str:
    if not isinstance(peft, LoraConfig):
        return "full fine-tuning"
    name = "DoRA" if isinstance(peft, DoraConfig) else "LoRA"
    return f"{name}, rank {peft.rank}, alpha {peft.alpha:g}, on {', '.join(peft.target_modules)}"
