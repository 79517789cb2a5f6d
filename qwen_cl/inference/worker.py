"""The child process, which has torch: ``python -m qwen_cl.inference.worker DIRECTORY``, started by child_process.py."""

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
from qwen_cl.inference.child_process import report_error
from qwen_cl.inference.generate import task_prompts
from qwen_cl.inference.prompts import Prompt, read_prompts
from qwen_cl.inference.tables import print_losses, print_samples, print_scores
from qwen_cl.inference.target_model import TargetModel, find_pretrained_model, find_target_model, output_file

if TYPE_CHECKING:
    from qwen_cl.inference.generation import Answer


def main(directory: str) -> int:
    """Do the task of ``directory``/config.yaml; write its error there for the launcher. Return the exit code."""
    register_schemas()
    config = load_config(Path(directory) / "config.yaml")
    try:
        work(config)
    except (UserError, RunFailed) as error:
        report_error(directory, error)
        return error.exit_code
    except OSError as error:
        report_error(directory, RunFailed(f"{error.strerror}: {error.filename}"))
        return RunFailed.exit_code
    except RuntimeError as error:  # torch raises this class on a CPU out of memory, and a subclass on a GPU
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        report_error(directory, RunFailed("out of memory; lower task.batch_size, or use cluster.precision=bf16"))
        return RunFailed.exit_code
    return 0


def work(config: RunConfig) -> None:
    """Do the task. Accelerator and precision of ``config`` are resolved (see ``resolve_target``)."""
    if isinstance(config.task, GenerateConfig):
        _generate(config, config.task)
    elif isinstance(config.replay, GeneratedReplayConfig) and isinstance(config.task, TrainingConfig):
        from qwen_cl.inference.self_replay import sample_text

        sample_text(config, config.replay)
    else:
        assert isinstance(config.task, EvaluateConfig)
        _evaluate(config, config.task)


def _generate(config: RunConfig, task: GenerateConfig) -> None:
    from qwen_cl.inference.generation import generate_answers
    from qwen_cl.inference.model import load_model

    output, prompts = output_file(task), task_prompts(task)
    target = find_target_model(config, task)
    model, done = load_model(target, config.cluster), []
    for answer in generate_answers(model, target.tokenizer(), prompts, task, config.seed):
        question = "" if task.prompt is not None else f"> {answer.prompt.last}\n"
        print(f"{question}{answer.text}" + ("" if task.prompt is not None else "\n"), flush=True)
        done.append(answer)
    if output is not None:
        write_text(output, "".join(json.dumps(answer.plain(), ensure_ascii=False) + "\n" for answer in done))


def _evaluate(config: RunConfig, task: EvaluateConfig) -> None:
    from qwen_cl.inference.loss import set_loss
    from qwen_cl.inference.model import load_model

    output, console = output_file(task), Console()
    prompts = [] if task.prompts is None else read_prompts(Path(task.prompts).expanduser(), raw=task.raw)
    target = find_target_model(config, task)
    merged = f", with {target.adapter.directory} merged in" if target.adapter else ""
    print(f"model: {target.label}{merged}", flush=True)
    before = _base_answers(config, task, target, prompts)
    model, tokenizer = load_model(target, config.cluster), target.tokenizer()
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
        write_text(output, json.dumps(_record(config, task, target, losses, scores, samples), **FORMAT) + "\n")


FORMAT: dict[str, Any] = {"indent": 2, "ensure_ascii": False}


def _base_answers(config: RunConfig, task: EvaluateConfig, target: TargetModel, prompts: list[Prompt]) -> list[Answer]:
    """Return the base model's answers, before the trained model is loaded: only one model is in memory at a time."""
    from qwen_cl.inference.model import load_model

    if target.run is None or not prompts:
        return []
    base = find_pretrained_model(target.run.config.model, target.data)
    model = load_model(base, config.cluster)
    done = _answers(config, task, model, target.tokenizer(), prompts)  # prompts tokenized alike for both models
    del model
    gc.collect()
    return done


def _answers(
    config: RunConfig, task: EvaluateConfig, model: Any, tokenizer: Any, prompts: list[Prompt]
) -> list[Answer]:
    from qwen_cl.inference.generation import generate_answers

    return list(generate_answers(model, tokenizer, prompts, task, config.seed))


def _samples(before: Sequence[Answer], after: Sequence[Answer]) -> list[dict[str, Any]]:
    """Return each prompt's fields with ``after``, and with the base model's answer ``before`` if the model is a run."""
    bases: list[dict[str, Any]] = [{"before": answer.text} for answer in before] or [{} for _ in after]
    return [{**answer.prompt.row, **base, "after": answer.text} for base, answer in zip(bases, after)]


def _record(
    config: RunConfig,
    task: EvaluateConfig,
    target: TargetModel,
    losses: dict[str, Any],
    scores: dict[str, Any],
    samples: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "model": target.run.config.model.source if target.run else target.label,
        "adapter": (target.run.config if target.run else config).model.adapter,
        "run": str(target.run.folder.directory) if target.run else None,
        "step": target.run.step if target.run else None,
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
