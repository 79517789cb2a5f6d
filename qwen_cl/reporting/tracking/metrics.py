"""The definition of metrics in W&B: their x axis and their summary."""

from __future__ import annotations

from typing import Any

TOKENS = "tokens"
"""The x axis: tokens trained on, which compares runs with different batch sizes. W&B's own Step is the optimizer's."""
LOWER_IS_BETTER = ("loss", "bits_per_byte")


def define(run: Any, name: str) -> None:
    """Define a metric: a loss is summarized by its minimum and its last value, any other metric by its last."""
    if name == TOKENS:
        run.define_metric(TOKENS, hidden=True)
    elif name.rpartition("/")[2] in LOWER_IS_BETTER:
        run.define_metric(name, step_metric=TOKENS, summary="min,last")
    else:
        run.define_metric(name, step_metric=TOKENS, summary="last")
