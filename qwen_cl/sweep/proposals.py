"""Optuna's proposals as trials, and their results reported to the study."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_cl.config.errors import UserError
from qwen_cl.config.sweep import Objective, OptunaConfig
from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.metrics import LOSS, TARGET, MetricsTail
from qwen_cl.runs.status import State
from qwen_cl.sweep.folder import finished_trials
from qwen_cl.sweep.outcome import Outcome, StopCause, outcome_of
from qwen_cl.sweep.planning import Planner
from qwen_cl.sweep.results import Result, read_result
from qwen_cl.sweep.trial import Trial, identify

if TYPE_CHECKING:
    from qwen_cl.sweep.space import Space


class Proposals:
    """A source of trials (see scheduler.py) that asks Optuna for them."""

    def __init__(self, study: Any, space: Space, planner: Planner, options: OptunaConfig, directory: Path) -> None:
        """Propose trials in the sweep's folder ``directory``."""
        import optuna

        self.study, self.space, self.planner, self.options, self.directory = study, space, planner, options, directory
        self.states = optuna.trial.TrialState
        interrupted = study.get_trials(deepcopy=False, states=[self.states.RUNNING])
        # A resumed sweep proposes the same points again, under the same numbers.
        self._interrupted = [optuna.trial.Trial(study, frozen._trial_id) for frozen in interrupted]
        self._proposed: dict[str, list[Any]] = {}
        """Proposals by the name of their trial; several if Optuna proposes the same point again."""
        self._tails: dict[str, tuple[int, MetricsTail]] = {}

    def next(self) -> Trial | None:
        """Return a trial of the next point that is not finished, or None."""
        while (proposal := self._propose()) is not None:
            trial = self._trial(proposal)
            if trial is None:
                self.study.tell(proposal, state=self.states.FAIL)
                continue
            self._proposed.setdefault(trial.name, []).append(proposal)
            if len(self._proposed[trial.name]) > 1:  # it runs already
                continue
            if not finished_trials([trial]):
                return trial
            self.ended(trial, outcome_of(trial.folder.status()))
        return None

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        """Report the outcome to the study."""
        for proposal in self._proposed.pop(trial.name):
            if outcome.state is State.COMPLETED and (values := self._values(read_result(trial.folder.directory))):
                self.study.tell(proposal, values)
            elif outcome.pruned:
                self.study.tell(proposal, state=self.states.PRUNED)
            elif outcome.state is not State.PREEMPTED:  # a stopped trial is proposed again when the sweep resumes
                self.study.tell(proposal, state=self.states.FAIL)

    def stop_cause(self, trial: Trial) -> StopCause | None:
        """Report new validation losses, and return a cause if the pruner stops the trial."""
        if self.options.reduction_factor is None:
            return None
        proposal = self._proposed[trial.name][0]
        for record in self._new_records(trial):
            step, loss = record["step"], record.get(f"{TARGET}/{LOSS}")
            if loss is None or not 0 < step < trial.plan.config.training.max_steps:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a restarted trial reports its first steps again
                proposal.report(loss, step)
            if proposal.should_prune():
                best = f"1 in {self.options.reduction_factor}"
                reason = f"pruned: its validation loss at step {step} ({loss:.4f}) is not among the best {best}"
                return StopCause(reason, FailureKind.pruned)
        return None

    def waiting(self) -> int:
        """Return the number of points that are left to propose."""
        return len(self._interrupted) + max(0, self.options.n_trials - len(self.study.get_trials(deepcopy=False)))

    def _propose(self) -> Any:
        if self._interrupted:
            return self._interrupted.pop(0)
        if len(self.study.get_trials(deepcopy=False)) >= self.options.n_trials:
            return None
        return self.study.ask(self.space.distributions)

    def _trial(self, proposal: Any) -> Trial | None:
        """Return the trial of a point, or None after printing why it is invalid."""
        overrides = self.space.overrides(proposal.params, self.planner)
        try:
            plan = self.planner.plan(overrides, self.space.keys)
            self.planner.prepare(plan)
        except UserError as error:
            print(error, file=sys.stderr)
            return None
        return identify([(overrides, plan)], self.space.keys, self.directory)[0]

    def _values(self, result: Result) -> Sequence[float]:
        """Return the objectives' values; empty if one was not evaluated."""
        measured = {Objective.val_loss: result.val_loss, Objective.forgetting: result.forgetting}
        values = [measured[objective] for objective in self.options.objectives]
        return [value for value in values if value is not None] if None not in values else []

    def _new_records(self, trial: Trial) -> list[dict[str, Any]]:
        attempt = trial.record()["attempts"]
        if self._tails.get(trial.name, (0, None))[0] != attempt:
            self._tails[trial.name] = attempt, MetricsTail(trial.folder)
        return self._tails[trial.name][1].new_records()
