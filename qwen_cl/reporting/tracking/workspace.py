"""The report of a sweep in W&B: a workspace and a report of the sweep's group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen_cl.config.errors import RunFailed, UserError
from qwen_cl.config.store import GROUPS
from qwen_cl.config.wandb import WandbConfig
from qwen_cl.reporting.figures import RANK, RATE
from qwen_cl.reporting.run_summary import RunSummary, differing
from qwen_cl.reporting.tracking.start import without_fault_reports
from qwen_cl.runs.metrics import TARGET

LOSS = f"{TARGET}/loss"
LAST = f"{LOSS}.last"
"""The name of the last loss in the summary (see metrics.py)."""
TITLES = {
    "throughput/tokens_per_second": "Tokens per second",
    "memory/peak_gib": "Peak memory (GiB)",
    "optim/lr": "Learning rate",
    "optim/grad_norm": "Gradient norm",
}


def require_publishable() -> None:
    """Check that a workspace can be published.

    Raises:
        UserError: there is no API key, or wandb-workspaces is not installed.
    """
    without_fault_reports()
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise UserError("task.publish=true needs a W&B key; run `wandb login`, or set WANDB_API_KEY")
    try:
        import wandb_workspaces.reports.v2  # noqa: F401
    except ImportError as error:
        raise UserError("task.publish=true needs wandb-workspaces: pip install 'qwen_cl[workspaces]'") from error


def publish(config: WandbConfig, group: str, trials: Sequence[RunSummary]) -> list[tuple[str, str]]:
    """Publish the workspace and the report; return their names and addresses.

    Raises:
        RunFailed: W&B refused them.
    """
    import wandb

    try:
        entity = config.entity or wandb.Api().default_entity
        workspace = build_workspace(entity, config.project, group, trials).save()
        report = build_report(entity, config.project, group, trials).save()
    except Exception as error:  # errors of W&B, of its client library and of the network have no common class
        text = " ".join(str(error).split())[:200]
        raise RunFailed(f"W&B refused the workspace or the report: {type(error).__name__}: {text}") from error
    return [("workspace", workspace.url), ("report", report.url)]


def build_workspace(entity: str, project: str, group: str, trials: Sequence[RunSummary]) -> Any:
    """Return the workspace, not saved yet."""
    import wandb_workspaces.workspaces as workspaces

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=group,
        sections=[
            workspaces.Section(name="Learning versus forgetting", panels=_comparing(trials), is_open=True),
            workspaces.Section(name="Losses", panels=_losses(trials), is_open=True),
            workspaces.Section(name="Optimizer and system", panels=[_line(key) for key in TITLES]),
        ],
        runset_settings=workspaces.RunsetSettings(filters=f"Group == '{group}'"),
    )


def build_report(entity: str, project: str, group: str, trials: Sequence[RunSummary]) -> Any:
    """Return the report, not saved yet."""
    import wandb_workspaces.reports.v2 as reports

    def grid(panels: list[Any]) -> Any:
        runs = reports.Runset(entity=entity, project=project, name=group, filters=f"Group == '{group}'")
        return reports.PanelGrid(runsets=[runs], panels=panels)

    return reports.Report(
        entity=entity,
        project=project,
        title=f"Sweep {group}",
        description=f"{len(trials)} trials over {', '.join(differing(list(trials))) or 'nothing'}",
        blocks=[
            reports.H2("Parameter importance and forgetting"),
            grid(_comparing(trials)),
            reports.H2("Losses"),
            grid(_losses(trials)),
            reports.H2("Optimizer and system"),
            grid([_line(key) for key in TITLES]),
        ],
    )


def _comparing(trials: Sequence[RunSummary]) -> list[Any]:
    """Return the panels that compare trials: parallel coordinates, importance, lr x rank, target versus retention."""
    import wandb_workspaces.reports.v2 as reports

    keys = differing(list(trials))
    retention = [f"retention/{name}/loss.last" for name in _sets(trials)]
    column = reports.ParallelCoordinatesPlotColumn
    columns = [column(reports.Config(_config_key(key)), key, log=key == RATE) for key in keys]
    columns += [column(reports.SummaryMetric(key), key) for key in (LAST, *retention)]
    panels: list[Any] = [
        reports.ParallelCoordinatesPlot(columns=columns, title="Parallel coordinates"),
        reports.ParameterImportancePlot(with_respect_to=LAST),
    ]
    if {RATE, RANK} <= set(keys):
        rank, rate, loss = reports.Config(RANK), reports.Config(RATE), reports.SummaryMetric(LAST)
        panels.append(reports.ScatterPlot(title="lr x rank: target loss", x=rank, y=rate, z=loss, log_y=True))
    for name, key in zip(_sets(trials), retention):
        loss, retained = reports.SummaryMetric(LAST), reports.SummaryMetric(key)
        panels.append(reports.ScatterPlot(title=f"Target versus {name}", x=loss, y=retained, running_ymin=True))
    return panels


def _losses(trials: Sequence[RunSummary]) -> list[Any]:
    lines = [("Validation loss", LOSS), ("Training loss", "train/loss")]
    lines += [(f"Retention: {name}", f"retention/{name}/loss") for name in _sets(trials)]
    return [_line(key, title) for title, key in lines]


def _line(key: str, title: str | None = None) -> Any:
    import wandb_workspaces.reports.v2 as reports

    return reports.LinePlot(title=title or TITLES[key], x="tokens", y=[key], title_x="tokens trained on")


def _sets(trials: Sequence[RunSummary]) -> list[str]:
    return list(dict.fromkeys(curve.name for trial in trials for curve in trial.retention))


def _config_key(key: str) -> str:
    """Return the key in W&B's config, where a group has its choice as ``type``."""
    return f"{key}.type" if key in GROUPS else key
