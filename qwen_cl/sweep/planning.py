"""The composition and planning of trials, before the first one starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from hydra.core.config_loader import ConfigLoader
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from qwen_cl.config.cluster import LocalConfig
from qwen_cl.config.data import TextDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.hydra_errors import explain, refuse_added_keys
from qwen_cl.config.overrides import override_key
from qwen_cl.config.replay import GeneratedReplayConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.config.task.training import TrainingConfig
from qwen_cl.data.chat.settings import previous_template_date
from qwen_cl.planning.plan import Memo, Plan, fetch_weights, make_plan, with_text

Compose = Callable[[Sequence[str]], DictConfig]


def composer(loader: ConfigLoader, master: DictConfig) -> Compose:
    """Return a function that composes a trial's config from its overrides, as Hydra's own launchers do."""

    def compose(overrides: Sequence[str]) -> DictConfig:
        try:
            config = loader.load_sweep_config(master, list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error)) from error
        with read_write(config), open_dict(config):
            del config["hydra"]
        return config

    return compose


class Planner:
    """The planner of trials, which checks what they have in common only once."""

    def __init__(self, compose: Compose, directory: Path | None = None) -> None:
        """Plan trials in the sweep's folder ``directory``, which may hold earlier trials."""
        self.compose = compose
        self._made_on = previous_template_date(sorted(directory.glob("*/config.yaml"))) if directory else None
        self._memo = Memo()
        self._fetched: set[str] = set()
        self._tokenized: set[str] = set()

    def plan(self, overrides: Sequence[str], keys: Sequence[str]) -> Plan:
        """Plan one trial. ``keys`` are those that differ between the trials.

        Raises:
            UserError: the trial is invalid; the message names it by the values of ``keys``.
        """
        try:
            return self._plan(overrides)
        except UserError as error:
            differing = [text for text in overrides if override_key(text) in keys]
            raise UserError(f"trial {' '.join(differing or overrides)}: {error}") from error

    def prepare(self, plan: Plan) -> None:
        """Tokenize the raw text and download the weights of a trial, unless another trial had the same.

        Raises:
            UserError: one of them fails.
        """
        config = plan.config
        if isinstance(config.data, TextDataConfig):
            key = repr((plan.model.source, config.data, config.seed))
            if key not in self._tokenized:
                with_text(plan, config.data)
                self._tokenized.add(key)
        if plan.model.source not in self._fetched:
            fetch_weights(plan)
            self._fetched.add(plan.model.source)

    def _plan(self, overrides: Sequence[str]) -> Plan:
        composed = self.compose(overrides)
        try:
            refuse_added_keys(composed)
            config = cast(RunConfig, OmegaConf.to_object(composed))
        except OmegaConfBaseException as error:
            raise UserError(explain(error)) from error
        _check_trial(config)
        return make_plan(config, self._memo, self._made_on)


def _check_trial(config: RunConfig) -> None:
    if not isinstance(config.task, TrainingConfig):
        raise UserError(
            "a trial must train a model: task=finetune or task=pretrain; add hydra/launcher=basic to run other tasks "
            "one after another, without a comparison"
        )
    if isinstance(config.replay, GeneratedReplayConfig) and not isinstance(config.cluster, LocalConfig):
        raise UserError(
            "replay=generated samples its text on this machine; for a sweep on a cluster sample it once, with a run, "
            "and name its file with replay=files"
        )
