"""The search space of a sweep as Optuna's distributions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override

from qwen_cl.config.errors import UserError
from qwen_cl.sweep.combinations import CHOOSERS, Combination, applicable
from qwen_cl.sweep.planning import Planner

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


class Space:
    """The distributions that are searched, and the overrides that all trials have in common."""

    def __init__(self, overrides: Sequence[Override]) -> None:
        """Take the overrides of the command line.

        Raises:
            UserError: no override has several values or an interval.
        """
        self.fixed: list[str] = []
        self.distributions: dict[str, BaseDistribution] = {}
        for override in overrides:
            if override.is_sweep_override():
                self.distributions[override.get_key_element()] = _distribution(override)
            else:
                self.fixed.append(str(override.input_line))
        if not self.distributions:
            raise UserError(
                "hydra/sweeper=optuna has nothing to search; write 'lr=tag(log,interval(1e-5,1e-3))' or peft.rank=8,16"
            )

    @property
    def keys(self) -> list[str]:
        """The keys that are searched."""
        return list(self.distributions)

    def overrides(self, values: dict[str, Any], planner: Planner) -> Combination:
        """Return the overrides of one point, without the keys that its choices of groups do not have."""
        combination = self._combination(values)
        groups = {key: self._choices(key) for key in self.keys if key in CHOOSERS}
        others = [
            self._combination({**values, **dict(zip(groups, chosen))}) for chosen in itertools.product(*groups.values())
        ]
        return applicable([combination, *others], planner.compose)[0][0]

    def bounds(self, planner: Planner) -> list[Combination]:
        """Return the points with all keys at their lowest and at their highest, which are checked for the others."""
        bounds = [{key: self._choices(key)[index] for key in self.keys} for index in (0, -1)]
        return [self.overrides(values, planner) for values in bounds]

    def _choices(self, key: str) -> list[Any]:
        from optuna.distributions import CategoricalDistribution

        distribution: Any = self.distributions[key]
        if isinstance(distribution, CategoricalDistribution):
            return list(distribution.choices)
        return [distribution.low, distribution.high]

    def _combination(self, values: dict[str, Any]) -> Combination:
        texts = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in values.items()}
        return (*self.fixed, *(f"{key}={text}" for key, text in texts.items()))


def _distribution(override: Override) -> BaseDistribution:
    _optuna()
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    log = "log" in getattr(value, "tags", ())
    if override.is_interval_sweep():
        is_integer = isinstance(value.start, int) and isinstance(value.end, int)
        return (IntDistribution if is_integer else FloatDistribution)(value.start, value.end, log=log)
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError("hydra/sweeper=optuna needs Optuna: pip install 'qwen_cl[search]'") from error
    return optuna
