"""Print what a run would do: facts first, then the recipe.

``python -m qwen_cl.training.dry_run CONFIG_FILE`` prints only the recipe. It is a separate process because NeMo, which
takes seconds to import, must not be imported by the launcher.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qwen_cl.config.cluster import ContainerConfig, SlurmConfig
from qwen_cl.config.data import FileDataConfig, TextDataConfig
from qwen_cl.config.errors import RunFailed
from qwen_cl.config.paths import ROOT
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import load_config, save_config
from qwen_cl.config.speed import When
from qwen_cl.config.task.training import FinetuneConfig
from qwen_cl.data.chat.settings import chat_facts
from qwen_cl.data.corpus.hub_dataset import is_hub_dataset
from qwen_cl.data.statistics_text import summary
from qwen_cl.launch.local import worker_environment
from qwen_cl.models.weight_mapping import count_parameters, expected_shapes
from qwen_cl.planning.memory import batch_shape, estimate_memory
from qwen_cl.planning.plan import Plan
from qwen_cl.planning.speed import has_static_shapes
from qwen_cl.reporting.console import adapter_facts, print_facts
from qwen_cl.runs.folder import RunFolder

GIB = 2**30


def print_plan(plan: Plan, folder: RunFolder, overrides: Sequence[str]) -> None:
    """Print what a run would do. ``overrides`` are those of this command, which a container is given."""
    console = Console()
    report = [] if plan.data_report is None else summary(plan.data_report)
    print_facts([*_facts(plan), *chat_facts(plan.config.data), *report, *_memory(plan)], console)
    if isinstance(plan.config.cluster, SlurmConfig):
        from qwen_cl.launch.slurm.script import render_script

        console.print("\nsbatch script", style="bold")
        print(render_script(plan.config.cluster, plan.config, [folder]))
    if isinstance(plan.config.cluster, ContainerConfig):
        from qwen_cl.launch.containers import render_container

        kind, text = render_container(plan.config, folder, overrides)
        console.print(f"\n{kind}", style="bold")
        print(text)
    console.print("\nrecipe", style="bold")
    sys.stdout.flush()
    _print_recipe(plan, folder)


def _facts(plan: Plan) -> list[tuple[str, str]]:
    config, shape = plan.config, plan.architecture
    cluster, task = config.cluster, config.training
    parameters = count_parameters(expected_shapes(shape))
    data = "random tokens"
    if isinstance(config.data, TextDataConfig):
        data = f"{config.data.path}, tokenized when the run starts"
    elif plan.files is not None:
        named = plan.files.train
        if isinstance(config.data, FileDataConfig) and is_hub_dataset(config.data.path):
            named = config.data.path
        data = f"{named} (sha256 {(plan.data_hash or '')[:12]}…)"
    return [
        ("model", plan.model.source),
        ("commit", plan.model.commit or "none: a local directory"),
        *adapter_facts(plan.adapter),
        ("architecture", f"{parameters:,} parameters, {shape.num_layers} layers of {shape.hidden_size}"),
        ("data", data),
        ("device", f"{cluster.world_size} x {plan.device.name}, {cluster.precision.value}"),
        (
            "layout",
            f"tensor_parallel {cluster.tensor_parallel}, pipeline_parallel {cluster.pipeline_parallel}, "
            f"context_parallel {cluster.context_parallel}, data_parallel {cluster.data_parallel}"
            + (", sequence_parallel" if cluster.sequence_parallel else ""),
        ),
        (
            "tokens per step",
            f"{task.global_batch_size} x {task.sequence_length} = {plan.tokens_per_step:,}{padding_note(config)}",
        ),
        ("learning rate", f"{config.lr:g}"),
        ("speed optimizations", ", ".join(name for name, on in config.speed.enabled().items() if on) or "none"),
    ]


def padding_note(config: RunConfig) -> str:
    if not isinstance(config.task, FinetuneConfig):
        return ""
    if has_static_shapes(config):
        return ", including padding (layers are compiled or captured for one shape)"
    return " at most (a micro batch is padded to its longest)"


def _memory(plan: Plan) -> list[tuple[str, str]]:
    config = plan.config
    estimate = estimate_memory(
        plan.architecture, batch_shape(config), config.peft, config.cluster, config.cluster.precision, config.speed
    )
    total = f"about {estimate.total / GIB:.2f} GiB per device"
    if plan.device.memory_bytes is not None:
        total += f" of {plan.device.memory_bytes / GIB:.0f} GiB"
        if estimate.total > plan.device.memory_bytes:
            total += "; too much: lower task.micro_batch_size, or raise cluster.tensor_parallel"
    parts = (
        f"weights {estimate.weights / GIB:.2f}, gradients and optimizer {estimate.gradients_and_optimizer / GIB:.2f}, "
        f"activations of full sequences {estimate.activations / GIB:.2f}"
        + (
            ", layers recomputed (speed.activation_recompute)"
            if config.speed.activation_recompute is When.always
            else ""
        )
    )
    return [("trainable", f"{estimate.trainable_parameters:,} parameters"), ("memory", total), ("", parts)]


def _print_recipe(plan: Plan, folder: RunFolder) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.yaml"
        save_config(plan.config, path)
        shown = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "qwen_cl.training.dry_run", str(path), str(folder.directory)],
            env=worker_environment(plan.config),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    if shown.returncode:
        raise RunFailed(f"the recipe could not be built:\n{shown.stderr}")
    print(shown.stdout, end="")


def main(config_file: str, output_dir: str) -> None:
    from qwen_cl.config.store import register_schemas
    from qwen_cl.training.worker import load_recipe, prepare

    register_schemas()
    config = load_config(Path(config_file))
    prepare(config)
    print(render_recipe(load_recipe(config, RunFolder(output_dir))))


def render_recipe(value: Any, indent: int = 0) -> str:
    """Return a recipe as the Python code that would build it: one argument per line, classes by their short names."""
    import fiddle

    inner, outer = " " * (indent + 4), " " * indent
    if isinstance(value, fiddle.Buildable):
        kind = "run.Partial" if isinstance(value, fiddle.Partial) else "run.Config"
        arguments = [f"{name}={render_recipe(part, indent + 4)}" for name, part in value.__arguments__.items()]
        return f"{kind}(\n" + "".join(f"{inner}{text},\n" for text in [_name(value), *arguments]) + f"{outer})"
    if isinstance(value, list) and any(isinstance(part, fiddle.Buildable) for part in value):
        return "[\n" + "".join(f"{inner}{render_recipe(part, indent + 4)},\n" for part in value) + f"{outer}]"
    return value.__qualname__ if callable(value) else repr(value)


def _name(buildable: Any) -> str:
    return str(buildable.__fn_or_cls__.__qualname__)


if __name__ == "__main__":
    main(*sys.argv[1:])
