"""Optuna's proposals with a real study; the tests write the files of a trial's process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qwen_cl.config.errors import UserError
from qwen_cl.config.store import register_schemas
from qwen_cl.config.sweep import OptunaConfig
from qwen_cl.runs.failure import FailureKind
from qwen_cl.runs.status import State, now
from qwen_cl.sweep.outcome import Outcome, StopCause
from qwen_cl.sweep.planning import Planner, composer
from qwen_cl.sweep.proposals import Proposals
from qwen_cl.sweep.search import open_study
from qwen_cl.sweep.space import Space
from qwen_cl.sweep.trial import Trial
from tests.conftest import ROOT

SPACE = ["lr=tag(log,interval(1e-5,1e-2))", "peft=lora,none", "peft.rank=int(interval(4,64))"]


@pytest.fixture(scope="module")
def planner() -> Iterator[Planner]:
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        master = hydra.compose_config("config", ["cluster.accelerator=cpu"], run_mode=RunMode.MULTIRUN)
        yield Planner(composer(hydra.config_loader, master))


def proposals(planner: Planner, directory: Path, *said: str, space: list[str] = SPACE, **options: Any) -> Proposals:
    """Return the proposals of a command, with the given options."""
    directory.mkdir(exist_ok=True)
    values = cast(DictConfig, OmegaConf.load(ROOT / "conf/hydra/sweeper/optuna.yaml"))
    del values["defaults"]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(OptunaConfig), values, options))
    assert isinstance(config, OptunaConfig)
    parsed = OverridesParser.create().parse_overrides(["cluster.accelerator=cpu", *said, *space])
    return Proposals(open_study(directory, config, 2), Space(parsed), planner, config, directory)


def start(trial: Trial) -> Trial:
    trial.begin(trial.record(), 0.0)
    trial.folder.mark_running(start=now(), step=0)
    return trial


def measure(trial: Trial, step: int, loss: float) -> None:
    trial.folder.append_metrics(
        {"step": step, "time": 0.0, "val/target/loss": loss, "retention/old/loss": 1 + step / 100}
    )


def finish(source: Proposals, trial: Trial, state: State, cause: StopCause | None = None) -> None:
    reason, kind = (None, None) if cause is None else (cause.reason, cause.kind)
    trial.folder.finish(state, reason, kind)
    source.ended(trial, Outcome(state, reason, kind))


def next_of(source: Proposals) -> Trial:
    trial = source.next()
    assert trial is not None
    return trial


def states(source: Proposals) -> list[str]:
    return [trial.state.name for trial in source.study.trials]


@pytest.mark.slow
def test_a_search_is_recorded_and_resumes_where_it_was_stopped(planner: Planner, tmp_path: Path) -> None:
    directory = tmp_path / "sweep"
    first = proposals(planner, directory, n_trials=4)
    trials = [start(next_of(first)) for _ in range(3)]
    measure(trials[0], 60, 2.5)
    finish(first, trials[0], State.COMPLETED)
    finish(first, trials[1], State.FAILED, StopCause("OutOfMemoryError: …", FailureKind.out_of_memory))
    finish(first, trials[2], State.PREEMPTED, StopCause("stopped on request", FailureKind.interrupted))
    assert states(first) == ["COMPLETE", "FAIL", "RUNNING"]
    assert first.waiting() == 1
    assert first.study.best_value == 2.5
    for trial in trials:
        values = dict(text.split("=", 1) for text in trial.overrides)
        assert 1e-5 <= float(values["lr"]) <= 1e-2
        assert ("peft.rank" in values) == (values["peft"] == "lora")
        assert trial.plan.config.lr == float(values["lr"])

    second = proposals(planner, directory, n_trials=4)
    assert second.waiting() == 2
    again = next_of(second)
    assert (again.name, again.config_hash) == (trials[2].name, trials[2].config_hash)
    start(again)
    new = next_of(second)
    assert new.number == 3
    # The same seed would propose the first point again.
    assert new.config_hash not in {trial.config_hash for trial in trials}
    assert second.next() is None
    assert second.waiting() == 0
    measure(again, 60, 2.0)
    finish(second, again, State.COMPLETED)
    assert states(second) == ["COMPLETE", "FAIL", "COMPLETE", "RUNNING"]


@pytest.mark.slow
def test_a_point_proposed_again_is_not_run_again(planner: Planner, tmp_path: Path) -> None:
    source = proposals(planner, tmp_path / "sweep", space=["seed=1,2"], n_trials=8)
    only = [start(next_of(source)), start(next_of(source))]
    assert {trial.plan.config.seed for trial in only} == {1, 2}
    for trial, loss in zip(only, (3.0, 2.0)):
        measure(trial, 60, loss)
        finish(source, trial, State.COMPLETED)
    assert source.next() is None
    assert len(source.study.trials) == 8
    assert {trial.value for trial in source.study.trials} == {3.0, 2.0}


@pytest.mark.slow
def test_who_falls_behind_at_a_rung_is_stopped(planner: Planner, tmp_path: Path) -> None:
    source = proposals(planner, tmp_path / "sweep", "task.max_steps=40", n_trials=4, reduction_factor=2, min_steps=2)
    good, bad = start(next_of(source)), start(next_of(source))
    measure(good, 0, 9.0)
    measure(bad, 0, 9.0)
    assert source.stop_cause(good) is None
    measure(good, 2, 3.0)
    assert source.stop_cause(good) is None
    assert source.stop_cause(bad) is None
    measure(bad, 2, 4.0)
    why = "pruned: its validation loss at step 2 (4.0000) is not among the best 1 in 2"
    cause = source.stop_cause(bad)
    assert cause == StopCause(why, FailureKind.pruned)
    finish(source, bad, State.PREEMPTED, cause)
    assert states(source) == ["RUNNING", "PRUNED"]
    # A resumed sweep leaves it as it is.
    later = proposals(planner, tmp_path / "sweep", "task.max_steps=40", n_trials=2, reduction_factor=2)
    assert next_of(later).name == good.name
    assert later.next() is None


@pytest.mark.slow
def test_two_objectives_make_a_front(planner: Planner, tmp_path: Path) -> None:
    both: dict[str, Any] = {"objectives": ["val_loss", "forgetting"], "reduction_factor": None}
    source = proposals(planner, tmp_path / "sweep", n_trials=3, **both)
    for step, loss in ((10, 3.0), (30, 2.0), (50, 2.5)):
        trial = start(next_of(source))
        measure(trial, 0, 9.0)
        measure(trial, step, loss)
        assert source.stop_cause(trial) is None
        finish(source, trial, State.COMPLETED)
    assert [trial.values for trial in source.study.best_trials] == [
        [3.0, pytest.approx(0.1)],
        [2.0, pytest.approx(0.3)],
    ]
    with pytest.raises(
        UserError, match=r"objectives \(val_loss\) were val_loss, forgetting in .*; use the same, or choose"
    ):
        proposals(planner, tmp_path / "sweep")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_trials": 0}, "hydra.sweeper.n_trials (0) must be at least 1"),
        ({"startup_trials": 0}, "hydra.sweeper.startup_trials (0) must be at least 1"),
        ({"seed": -1}, "hydra.sweeper.seed (-1) must be at least 0"),
        ({"reduction_factor": 1}, "hydra.sweeper.reduction_factor (1) must be at least 2"),
        ({"min_steps": 0}, "hydra.sweeper.min_steps (0) must be at least 1"),
        ({"objectives": []}, "hydra.sweeper.objectives (none) must name val_loss, forgetting or both, each once"),
        ({"objectives": ["forgetting"]}, "hydra.sweeper.reduction_factor (3) prunes by the validation loss alone"),
    ],
)
def test_an_option_out_of_its_range_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        proposals(None, tmp_path / "sweep", **options)  # type: ignore[arg-type]
    assert str(refused.value).startswith(message)


def test_a_search_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"^hydra/sweeper=optuna has nothing to search; write 'lr=tag"):
        Space(OverridesParser.create().parse_overrides(["lr=1e-4"]))


def test_a_point_that_could_not_run_is_a_failure(
    planner: Planner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = proposals(planner, tmp_path / "sweep", space=["task.warmup_steps=100,200"], n_trials=2)
    assert source.next() is None
    assert states(source) == ["FAIL", "FAIL"]
    assert "task.warmup_steps (" in capsys.readouterr().err
    assert json.loads((tmp_path / "sweep/study.journal").read_text().splitlines()[0])
