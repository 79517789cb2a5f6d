"""The process that has torch: ``python -m qwen_cl.inference.worker DIRECTORY``, started by ``child``."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qwen_cl.config.errors import RunFailed, UserError
from qwen_cl.config.replay import GeneratedReplayConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import load_config
from qwen_cl.config.store import register_schemas
from qwen_cl.config.task.inference import EvaluateConfig, GenerateConfig
from qwen_cl.config.task.training import TrainingConfig
from qwen_cl.data.eval_sets import read_sets, score_set
from qwen_cl.data.set_files import set_hash
from qwen_cl.files.atomic import write_text
from qwen_cl.inference.child_process import report_mistake
from qwen_cl.inference.generate import prompts_of
from qwen_cl.inference.prompts import Prompt, read_prompts
from qwen_cl.inference.tables import print_losses, print_samples, print_scores
from qwen_cl.inference.target_model import TargetModel, find_model, find_subject, output_file

if TYPE_CHECKING:
    from qwen_cl.inference.generation import Answer


def main(directory: str) -> int:
    register_schemas()
    config = load_config(Path(directory) / "config.yaml")
    try:
        work(config)
    except (UserError, RunFailed) as error:
        report_mistake(directory, error)
        return error.exit_code
    except OSError as error:
        report_mistake(directory, RunFailed(f"{error.strerror}: {error.filename}"))
        return RunFailed.exit_code
    except RuntimeError as error:  # what torch raises when memory runs out, on a GPU by a class of its own
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        report_mistake(directory, RunFailed("out of memory; lower task.batch_size, or use cluster.precision=bf16"))
        return RunFailed.exit_code
    return 0


def work(config: RunConfig) -> None:
    """Does what the task says; ``config`` has its device settled (``subject.settle``)."""
    if isinstance(config.task, GenerateConfig):
        _generate(config, config.task)
    elif isinstance(config.replay, GeneratedReplayConfig) and isinstance(config.task, TrainingConfig):
        from qwen_cl.inference.self_replay import sample_text

        sample_text(config, config.replay)
    else:
        assert isinstance(config.task, EvaluateConfig)
        _evaluate(config, config.task)


def _generate(config: RunConfig, task: GenerateConfig) -> None:
    from qwen_cl.inference.generation import answers
    from qwen_cl.inference.model import load_model

    output, prompts = output_file(task), prompts_of(task)
    subject = find_subject(config, task)
    model, done = load_model(subject, config.cluster), []
    for answer in answers(model, subject.tokenizer(), prompts, task, config.seed):
        asked = "" if task.prompt is not None else f"> {answer.prompt.last}\n"
        print(f"{asked}{answer.text}" + ("" if task.prompt is not None else "\n"), flush=True)
        done.append(answer)
    if output is not None:
        write_text(output, "".join(json.dumps(answer.plain(), ensure_ascii=False) + "\n" for answer in done))


def _evaluate(config: RunConfig, task: EvaluateConfig) -> None:
    from qwen_cl.inference.loss import set_loss
    from qwen_cl.inference.model import load_model

    output, console = output_file(task), Console()
    prompts = [] if task.prompts is None else read_prompts(Path(task.prompts).expanduser(), raw=task.raw)
    subject = find_subject(config, task)
    merged = f", with {subject.adapter.directory} merged in" if subject.adapter else ""
    print(f"model: {subject.label}{merged}", flush=True)
    before = _base_answers(config, task, subject, prompts)
    model, tokenizer = load_model(subject, config.cluster), subject.tokenizer()
    losses = {}
    for named in read_sets(task.sets, "task.sets"):
        scored = score_set(named, tokenizer, task.sequence_length, task.loss_on)
        losses[named.name] = set_loss(model, scored, task.batch_size)
        print(f"{named.name}: loss {losses[named.name].loss:.4f}", flush=True)
    scores: dict[str, Any] = {}
    if task.lm_eval:
        from qwen_cl.inference.lm_eval import run_harness

        scores = run_harness(model, tokenizer, task, config.seed)
    samples = _samples(before, _answers(config, task, model, tokenizer, prompts))
    print_losses(losses, console)
    print_scores(scores, console)
    print_samples(samples, console)
    if output is not None:
        write_text(output, json.dumps(_record(config, task, subject, losses, scores, samples), **FORMAT) + "\n")


FORMAT: dict[str, Any] = {"indent": 2, "ensure_ascii": False}


def _base_answers(config: RunConfig, task: EvaluateConfig, subject: TargetModel, prompts: list[Prompt]) -> list[Answer]:
    """Before the trained model is loaded, so that only one is in memory."""
    from qwen_cl.inference.model import load_model

    if subject.run is None or not prompts:
        return []
    base = find_model(subject.run.config.model, subject.data)
    model = load_model(base, config.cluster)
    done = _answers(config, task, model, subject.tokenizer(), prompts)  # asked in the same words
    del model
    gc.collect()
    return done


def _answers(
    config: RunConfig, task: EvaluateConfig, model: Any, tokenizer: Any, prompts: list[Prompt]
) -> list[Answer]:
    from qwen_cl.inference.generation import answers

    return list(answers(model, tokenizer, prompts, task, config.seed))


def _samples(before: Sequence[Answer], after: Sequence[Answer]) -> list[dict[str, Any]]:
    """The prompt's own fields, ``before`` of the base where a run was asked, and ``after``."""
    bases: list[dict[str, Any]] = [{"before": answer.text} for answer in before] or [{} for _ in after]
    return [{**answer.prompt.row, **base, "after": answer.text} for base, answer in zip(bases, after)]


def _record(
    config: RunConfig,
    task: EvaluateConfig,
    subject: TargetModel,
    losses: dict[str, Any],
    scores: dict[str, Any],
    samples: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "model": subject.run.config.model.source if subject.run else subject.label,
        "adapter": (subject.run.config if subject.run else config).model.adapter,
        "run": str(subject.run.folder.directory) if subject.run else None,
        "step": subject.run.step if subject.run else None,
        "precision": config.cluster.precision.value,
        "sequence_length": task.sequence_length,
        "loss_on": task.loss_on.value,
        "sets": {
            name: {**loss.plain(), "sha256": set_hash(task.sets[name], f"task.sets.{name}")}
            for name, loss in losses.items()
        },
        "lm_eval": scores,
        "samples": samples,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
