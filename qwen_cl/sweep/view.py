"""The terminal view of a sweep: a live line per trial, or on a pipe a line per event."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from qwen_cl.runs.metrics import LOSS, TARGET, MetricsTail
from qwen_cl.runs.status import State
from qwen_cl.sweep.scheduler import Scheduler
from qwen_cl.sweep.trial import Trial

WAITING = "waiting"
RUNNING = State.RUNNING.value
SUBMITTED = State.SUBMITTED.value
STYLES = {
    WAITING: "dim",
    SUBMITTED: "dim",
    RUNNING: "cyan",
    "COMPLETED": "green",
    "FAILED": "red",
    "PREEMPTED": "yellow",
}
BY_PRIORITY = (RUNNING, "FAILED", "PREEMPTED", SUBMITTED, WAITING, "COMPLETED")
"""The states in the order in which lines are kept when the terminal is too low for all."""


@dataclass(slots=True)
class Line:
    """The line of a trial."""

    trial: Trial
    state: str = WAITING
    note: str = ""
    """The phase before training, or the reason why it did not complete."""
    latest: dict[str, Any] = field(default_factory=dict)
    """The latest value of every metric."""
    first_step: tuple[float, int] | None = None
    """Time and number of the first step in the log."""
    tail: MetricsTail | None = None
    attempt: int = 0

    def follow(self) -> None:
        """Read the metrics and the status that were written since the last call."""
        attempt = self.trial.record().get("attempts", 0)
        if self.tail is None or attempt != self.attempt:  # a new attempt, in a new folder of the same name
            self.tail, self.attempt, self.latest, self.first_step = MetricsTail(self.trial.folder), attempt, {}, None
        for record in self.tail.new_records():
            self.latest.update(record)
            if self.first_step is None and "train/loss" in record:
                self.first_step = (record["time"], record["step"])
        status = self.trial.folder.status()
        self.note = "" if "train/loss" in self.latest else status.phase or "starting"

    @property
    def step(self) -> int:
        """The latest step."""
        return int(self.latest.get("step", 0))

    @property
    def max_steps(self) -> int:
        """The number of steps in all."""
        return self.trial.plan.config.training.max_steps

    def seconds_left(self) -> float | None:
        """Return the seconds that remain at the average rate so far, or None before the second step."""
        if self.first_step is None or self.step == self.first_step[1]:
            return None
        since, first = self.first_step
        return (self.latest["time"] - since) / (self.step - first) * (self.max_steps - self.step)

    def figure(self, key: str, form: str) -> str:
        """Return the latest value of a metric as text; empty without one."""
        return format(self.latest[key], form) if key in self.latest else ""


class SweepView:
    """The view of a sweep, as a context manager."""

    def __init__(self, console: Console) -> None:
        """Show the sweep on ``console``."""
        self.console = console
        self.lines: dict[str, Line] = {}
        self.started = time.monotonic()
        self._stopping = False
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> SweepView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, trial: Trial, state: str | None) -> None:
        """Add a line; ``state`` is given for a trial that has already ended."""
        line = self.lines[trial.name] = Line(trial)
        if state is not None:
            line.follow()
            line.state, line.note = state, trial.folder.status().reason or ""

    def update(self, scheduler: Scheduler) -> None:
        """Update all lines."""
        if scheduler.interrupted and not self._stopping:
            self._stopping = True
            notice = "Stopping: every trial saves a checkpoint first. Interrupt again to kill the trials."
            detached = "The jobs keep running; the same command finds them again."
            self.console.print(detached if scheduler.start.detached else notice, highlight=False)
        running = {process.trial.name: process for process in scheduler.running}
        for process in running.values():
            if process.trial.name not in self.lines:  # proposed by a search meanwhile
                self.add(process.trial, None)
        for name, line in self.lines.items():
            outcome = scheduler.outcomes.get(name)
            if name in running:
                self._change(line, running[name].state)
            elif outcome is not None and line.state != outcome.state.value:
                self._change(line, outcome.state.value, outcome.reason or "")
        if self._live is not None:
            self._live.update(self.table(), refresh=True)

    def _change(self, line: Line, state: str, note: str | None = None) -> None:
        before = line.state, line.attempt
        line.follow()
        line.state = state
        line.note = line.note if note is None else note
        if self._live is None and before != (line.state, line.attempt):
            self.console.print(describe(line), highlight=False, soft_wrap=True, markup=False)

    def table(self) -> Table:
        """Return the live table."""
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        table = Table(
            title=f"{tally(line.state for line in self.lines.values())}, {minutes}:{seconds:02}",
            title_justify="left",
            box=None,
        )
        for name in ("trial", "state"):
            table.add_column(name, overflow="ellipsis", no_wrap=True)
        for name in ("step", "loss", "val", "tokens/s", "ETA"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", overflow="ellipsis", no_wrap=True)
        for line in _fitting(list(self.lines.values()), self.console.height - 4):
            table.add_row(*cells(line), style=STYLES[line.state])
        return table


def cells(line: Line) -> list[str]:
    """Return the cells of a line, in the order of the table's columns."""
    left = line.seconds_left() if line.state == RUNNING else None
    return [
        line.trial.name,
        line.state,
        f"{line.step}/{line.max_steps}",
        line.figure("train/loss", ".3f"),
        line.figure(f"{TARGET}/{LOSS}", ".3f"),
        line.figure("throughput/tokens_per_second", ",.0f"),
        "" if left is None else f"{int(left) // 60}:{int(left) % 60:02}",
        line.note,
    ]


def describe(line: Line) -> str:
    """Return the text of one event, for a pipe."""
    _, state, step, loss, val, rate, _, note = cells(line)
    if line.state == RUNNING:
        return f"{line.trial.name}  started" + (f", attempt {line.attempt}" if line.attempt > 1 else "")
    if line.state == SUBMITTED:
        return f"{line.trial.name}  in the queue"
    facts = [f"step {step}", loss and f"loss {loss}", val and f"val {val}", rate and f"{rate} tokens/s", note]
    return f"{line.trial.name}  {state}  " + "  ".join(filter(None, facts))


def tally(states: Iterable[str]) -> str:
    """Return the number of trials in each state."""
    counts = Counter(states)
    return ", ".join(f"{counts[state]} {state}" for state in (WAITING, *State.__members__) if counts[state])


def _fitting(lines: Sequence[Line], height: int) -> Sequence[Line]:
    if len(lines) <= height:
        return lines
    return sorted(lines, key=lambda line: BY_PRIORITY.index(line.state))[: max(1, height)]
