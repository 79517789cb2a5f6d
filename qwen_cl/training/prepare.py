"""Prepare a run's folder before its processes start: its record and its inputs."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

from omegaconf import OmegaConf

from qwen_cl.config.data import TextDataConfig
from qwen_cl.config.invocation import Invocation
from qwen_cl.config.paths import ROOT
from qwen_cl.config.saved import save_config
from qwen_cl.data.chat.settings import write_template
from qwen_cl.data.corpus.text_dataset import save_target
from qwen_cl.data.rows import dataset_commits
from qwen_cl.data.statistics_text import report_page
from qwen_cl.models.architecture import TIED
from qwen_cl.models.config_files import write_small_files
from qwen_cl.models.fingerprint import fingerprint
from qwen_cl.models.normalized import write_normalized_files
from qwen_cl.planning.memory import batch_shape, estimate_memory
from qwen_cl.planning.plan import Plan, fetch_weights, with_text
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.manifest import VerifyProgress
from qwen_cl.runs.provenance import git_commit, versions
from qwen_cl.runs.resume import Resumption, resume
from qwen_cl.runs.status import now


def fetch_inputs(plan: Plan) -> Plan:
    """Tokenize raw text and download the weights, so that all inputs of the run are local.

    Raises:
        UserError: an input is missing or invalid.
    """
    if isinstance(plan.config.data, TextDataConfig):
        plan = with_text(plan, plan.config.data)
    return fetch_weights(plan)


def initialize_run_folder(
    plan: Plan, folder: RunFolder, progress: VerifyProgress | None = None, invocation: Invocation | None = None
) -> Resumption:
    """Write the record and the inputs of a run before it starts. Without ``invocation`` no command is recorded.

    Raises:
        UserError: the folder holds another run, or one that cannot be resumed. Nothing was changed.
    """
    resumption = resume(folder, plan.config, _facts(plan), progress)
    folder.reserve_disk_space()
    write_worker_inputs(plan, folder)
    if invocation is not None:
        _write_hydra(invocation, folder)
    if plan.data_report is not None:
        folder.data_report.write_text(report_page(plan.data_report), encoding="utf-8")
        record = json.dumps(asdict(plan.data_report), indent=2, ensure_ascii=False)
        folder.data_report_json.write_text(record + "\n", encoding="utf-8")
    folder.mark_running(
        phase="starting",
        start=folder.status().start or now(),
        step=0 if resumption.checkpoint is None else resumption.checkpoint.step,
        job=None,  # the job of an earlier start; submitting sets the new one
        model_source=plan.model.source,
        model_commit=plan.model.commit,
        model_fingerprint=_fingerprint(plan),
        model_adapter=plan.config.model.adapter,
        model_adapter_sha256=_adapter_hash(plan),
        data_sha256=plan.data_hash,
        bos_token=plan.bos_token,
        data_commits=dataset_commits(plan.config.data),
        trainable_parameters=_trainable_parameters(plan),
        tokenizer_hash=plan.tokenizer_hash,
        output_layer=_output_layer(plan),
        git_commit=git_commit(ROOT),
        versions=versions(),
        device=plan.device.name,
    )
    return resumption


def _facts(plan: Plan) -> dict[str, str | None]:
    """Return the properties of a run that its config alone does not determine."""
    return {
        "data.hash": plan.data_hash,
        "data.bos_token": plan.bos_token,
        "model.fingerprint": _fingerprint(plan),
        "model.tokenizer": plan.tokenizer_hash,
        "model.output_layer": _output_layer(plan),
        "model.adapter_sha256": _adapter_hash(plan),
    }


def _adapter_hash(plan: Plan) -> str | None:
    return None if plan.adapter is None else plan.adapter.sha256


def _output_layer(plan: Plan) -> str | None:
    """Return a mark of an untied output layer that config.json calls tied; earlier versions did not record it."""
    untied = plan.model.config.get(TIED) and not plan.architecture.tied_embeddings
    return "its own, and not the embedding" if untied else None


def _fingerprint(plan: Plan) -> str | None:
    """Return the fingerprint of a local directory; a commit needs none."""
    return fingerprint(plan.model.directory) if plan.model.commit is None else None


def _write_hydra(invocation: Invocation, folder: RunFolder) -> None:
    hydra = folder.directory / ".hydra"
    hydra.mkdir(exist_ok=True)
    OmegaConf.save(list(invocation.typed), hydra / "overrides.yaml")
    OmegaConf.save({"hydra": {"runtime": invocation.runtime}}, hydra / "hydra.yaml")
    shutil.copyfile(folder.config, hydra / "config.yaml")


def _trainable_parameters(plan: Plan) -> int:
    config = plan.config
    estimate = estimate_memory(
        plan.architecture, batch_shape(config), config.peft, config.cluster, config.cluster.precision
    )
    return estimate.trainable_parameters


def write_worker_inputs(plan: Plan, folder: RunFolder) -> None:
    """Write what the run's processes read: the config and the tokenizer, and the files that an export passes on.

    The tokenizer is not read from the model's directory, because NeMo copies the tokenizer's directory into every
    checkpoint, weights included.
    """
    write_normalized_files(plan.model.directory, folder.tokenizer)
    write_small_files(plan.model.directory, folder.model_files)
    for directory in (folder.tokenizer, folder.model_files):
        write_template(plan.config.data, directory)
    save_config(plan.config, folder.config)
    if plan.text is not None:
        save_target(plan.text, folder.text_target)
    if plan.files is not None and plan.files.moved:
        folder.moved_rows.write_text(json.dumps(plan.files.moved) + "\n", encoding="utf-8")
    else:
        folder.moved_rows.unlink(missing_ok=True)
