"""The command line of a task for functions that a test calls without launch.py."""

from __future__ import annotations

from pathlib import Path

from qwen_cl.config.invocation import Invocation


def invocation(*overrides: str, directory: Path = Path()) -> Invocation:
    return Invocation(output_dir=directory, overrides=overrides, typed=overrides, runtime={})
