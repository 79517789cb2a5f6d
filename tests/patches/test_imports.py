"""Modules that a training process does not import with NeMo."""

from __future__ import annotations

import subprocess
import sys

import pytest

ASKED = """
import sys
from qwen_cl.training import setup

setup.prepare(cpu=True)
import qwen_cl.training.recipe
from nemo_run.core.execution.lepton import LeptonExecutor, LeptonJobState

print(sorted({"fastapi", "uvicorn"} & set(sys.modules)), LeptonJobState.Running)
try:
    LeptonExecutor.status(None, "job")
except ImportError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_web_server_is_not_imported_to_train() -> None:
    done = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    empty, said = done.stdout.splitlines()[-2:]
    assert empty == "[] LeptonJobState.Running"
    assert said == "leptonai.api.v2.client is not imported in a process that trains"


def test_a_numpy_without_what_megatron_calls_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_cl.patches.imports import import_megatron

    monkeypatch.delattr("numpy.product")
    import_megatron()
    from numpy import product  # type: ignore[attr-defined]

    assert product((2, 3)) == 6
