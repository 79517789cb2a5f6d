"""Optuna's proposals as trials, and what came of them as its results."""

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
from qwen_cl.sweep.folder import decided
from qwen_cl.sweep.outcome import Outcome, StopCause, outcome_of
from qwen_cl.sweep.planning import Planner
from qwen_cl.sweep.results import Result, read_result
from qwen_cl.sweep.trial import Trial, identify

if TYPE_CHECKING:
    from qwen_cl.sweep.space import Space


class Proposals:
    """A source of trials (see scheduler.py)."""

    def __init__(self, study: Any, space: Space, planner: Planner, options: OptunaConfig, directory: Path) -> None:
        import optuna

        self.study, self.space, self.planner, self.options, self.directory = study, space, planner, options, directory
        self.states = optuna.trial.TrialState
        cut_off = study.get_trials(deepcopy=False, states=[self.states.RUNNING])
        # Of a sweep that was stopped: the same points again, under the same numbers.
        self._cut_off = [optuna.trial.Trial(study, frozen._trial_id) for frozen in cut_off]
        self._proposed: dict[str, list[Any]] = {}
        """By the trial's name: the proposals that it answers, since one point may be proposed twice."""
        self._tails: dict[str, tuple[int, MetricsTail]] = {}

    def next(self) -> Trial | None:
        while (proposal := self._propose()) is not None:
            trial = self._trial(proposal)
            if trial is None:
                self.study.tell(proposal, state=self.states.FAIL)
                continue
            self._proposed.setdefault(trial.name, []).append(proposal)
            if len(self._proposed[trial.name]) > 1:  # it runs already
                continue
            if not decided([trial]):
                return trial
            self.ended(trial, outcome_of(trial.folder.status()))
        return None

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        for proposal in self._proposed.pop(trial.name):
            if outcome.state is State.COMPLETED and (values := self._values(read_result(trial.folder.directory))):
                self.study.tell(proposal, values)
            elif outcome.pruned:
                self.study.tell(proposal, state=self.states.PRUNED)
            elif outcome.state is not State.PREEMPTED:  # what was stopped is proposed again when the sweep goes on
                self.study.tell(proposal, state=self.states.FAIL)

    def why_stop(self, trial: Trial) -> StopCause | None:
        if self.options.reduction_factor is None:
            return None
        proposal = self._proposed[trial.name][0]
        for record in self._new_records(trial):
            step, loss = record["step"], record.get(f"{TARGET}/{LOSS}")
            if loss is None or not 0 < step < trial.plan.config.training.max_steps:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a trial that started again says the same once more
                proposal.report(loss, step)
            if proposal.should_prune():
                best = f"1 in {self.options.reduction_factor}"
                why = f"pruned: its validation loss at step {step} ({loss:.4f}) is not among the best {best}"
                return StopCause(why, FailureKind.pruned)
        return None

    def waiting(self) -> int:
        return len(self._cut_off) + max(0, self.options.n_trials - len(self.study.get_trials(deepcopy=False)))

    def _propose(self) -> Any:
        if self._cut_off:
            return self._cut_off.pop(0)
        if len(self.study.get_trials(deepcopy=False)) >= self.options.n_trials:
            return None
        return self.study.ask(self.space.distributions)

    def _trial(self, proposal: Any) -> Trial | None:
        """None for a point that could not run, which says why."""
        overrides = self.space.overrides(proposal.params, self.planner)
        try:
            plan = self.planner.plan(overrides, self.space.keys)
            self.planner.prepare(plan)
        except UserError as error:
            print(error, file=sys.stderr)
            return None
        return identify([(overrides, plan)], self.space.keys, self.directory)[0]

    def _values(self, result: Result) -> Sequence[float]:
        """Empty where one of them was not measured."""
        measured = {Objective.val_loss: result.val_loss, Objective.forgetting: result.forgotten}
        values = [measured[objective] for objective in self.options.objectives]
        return [value for value in values if value is not None] if None not in values else []

    def _new_records(self, trial: Trial) -> list[dict[str, Any]]:
        attempt = trial.record()["attempts"]
        if self._tails.get(trial.name, (0, None))[0] != attempt:
            self._tails[trial.name] = attempt, MetricsTail(trial.folder)
        return self._tails[trial.name][1].new_records()
