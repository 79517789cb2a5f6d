"""Ctrl-C at any moment of the launcher: exit code 130, and no traceback."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_cl.config.errors import EXIT_INTERRUPTED, caused_by_interrupt
from tests.conftest import ROOT

MOMENTS = {
    "its libraries are imported": r"\| +hydra\.types$",
    "its own modules are imported": r"\| +qwen_cl\.config\.errors$",
    "the task is imported": r"\| +qwen_cl\.runs\.folder$",
    "the model is looked at": r"\| +tokenizers$",
    "another process works for it": r"^recipe$",
}
"""A pattern of a line of Python's import log or of the launcher's output, by moment."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_launcher_says_nothing_of_its_own(moment: str, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "launch.py", "dry_run=true", "cluster.accelerator=cpu"]
    with subprocess.Popen(
        [*command, f"hydra.run.dir={tmp_path / 'run'}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launcher:
        assert launcher.stdout is not None
        assert any(re.search(MOMENTS[moment], line.rstrip("\n")) for line in launcher.stdout)
        launcher.send_signal(signal.SIGINT)
        said = launcher.stdout.read()
    assert launcher.returncode == EXIT_INTERRUPTED, said
    assert "Traceback" not in said
    assert "KeyboardInterrupt" not in said


def test_what_fails_because_of_an_interrupt_is_one() -> None:
    """Fail during the cleanup of an interrupt, as OmegaConf does while it copies a config."""

    def fails_while_it_cleans_up() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            getattr(None, "_invalidate_flags_cache")  # noqa: B009

    with pytest.raises(AttributeError) as caught:
        fails_while_it_cleans_up()
    assert caused_by_interrupt(caught.value)
    assert caused_by_interrupt(KeyboardInterrupt())
    assert not caused_by_interrupt(AttributeError())


def test_who_imports_the_launcher_keeps_its_environment() -> None:
    """Check that importing launch.py does not disable torch in transformers, which its own process does."""
    check = "import os; before = dict(os.environ); import launch; assert dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)
