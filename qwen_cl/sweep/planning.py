"""Every trial composed, typed and planned before the first one starts."""

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
    """Composes a trial's config from its overrides, as Hydra's own launcher would."""

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
    """Checks trials as a run alone would be checked, but what they have in common once."""

    def __init__(self, compose: Compose, directory: Path | None = None) -> None:
        """``directory`` is the sweep's, which may hold trials already."""
        self.compose = compose
        self._made_on = previous_template_date(sorted(directory.glob("*/config.yaml"))) if directory else None
        self._once = Memo()
        self._fetched: set[str] = set()
        self._tokenised: set[str] = set()

    def plan(self, overrides: Sequence[str], keys: Sequence[str]) -> Plan:
        """Raises UserError, which says which trial it is by the ``keys`` that differ between them."""
        try:
            return self._plan(overrides)
        except UserError as error:
            said = [text for text in overrides if override_key(text) in keys]
            raise UserError(f"trial {' '.join(said or overrides)}: {error}") from error

    def prepare(self, plan: Plan) -> None:
        """Fill the caches once for all trials: raw text is tokenized, the weights are fetched. Raises UserError."""
        config = plan.config
        if isinstance(config.data, TextDataConfig):
            key = repr((plan.model.source, config.data, config.seed))
            if key not in self._tokenised:
                with_text(plan, config.data)
                self._tokenised.add(key)
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
        _refuse_what_is_no_trial(config)
        return make_plan(config, self._once, self._made_on)


def _refuse_what_is_no_trial(config: RunConfig) -> None:
    if not isinstance(config.task, TrainingConfig):
        raise UserError(
            "a trial trains: task=finetune or task=pretrain; add hydra/launcher=basic to run other tasks one after "
            "another, without a comparison"
        )
    if isinstance(config.replay, GeneratedReplayConfig) and not isinstance(config.cluster, LocalConfig):
        raise UserError(
            "replay=generated is written where the command is; for a sweep on a cluster write it once, with a run, and "
            "name its file with replay=files"
        )
