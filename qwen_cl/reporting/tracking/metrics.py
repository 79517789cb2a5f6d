"""How W&B shows each metric: over which axis, and which of its values sums up the run."""

from __future__ import annotations

from typing import Any

TOKENS = "tokens"
"""Tokens trained on: the x axis, in which runs of unlike batches compare. W&B's own Step is the optimizer's."""
BEST_IS_LEAST = ("loss", "bits_per_byte")


def define(run: Any, name: str) -> None:
    """A loss is summed up by its least and its last value, anything else by its last."""
    if name == TOKENS:
        run.define_metric(TOKENS, hidden=True)
    elif name.rpartition("/")[2] in BEST_IS_LEAST:
        run.define_metric(name, step_metric=TOKENS, summary="min,last")
    else:
        run.define_metric(name, step_metric=TOKENS, summary="last")
