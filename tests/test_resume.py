"""A recipe resumed at the level of loading: the base from where it was, the adapter from the checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qwen_cl.config.schema import RunConfig
from qwen_cl.config.store import register_schemas
from qwen_cl.opening import write_worker_inputs
from qwen_cl.plan import make_plan
from qwen_cl.run_folder import RunFolder
from qwen_cl.source.vocabulary import tokenizer_hash
from tests.conftest import ROOT
from tests.hub import client_environment
from tests.models import save_random_model

METHODS = ("lora", "dora", "none")
COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40


@dataclass(frozen=True)
class Resumed:
    directory: Path
    results: dict[str, Any]
    """By folder and mode: the loss of each step, or the error."""

    def source(self, method: str, *, other: bool = False) -> str:
        """Adapters start from the Hub, full fine-tuning from a directory."""
        if method == "none":
            return str(self.directory / ("copy" if other else "model"))
        return f"hf://org/tiny@{OTHER_COMMIT if other else COMMIT}"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """Of each method: trained to step 4, stopped at step 2, then resumed in another process."""
    directory = tmp_path_factory.mktemp("resume")
    model = save_random_model(directory / "model", vocab_size=1537)
    snapshots = directory / "home/hub/models--org--tiny/snapshots"
    for copy in (directory / "copy", snapshots / COMMIT, snapshots / OTHER_COMMIT):
        shutil.copytree(model, copy)
    runs = Resumed(directory, {})
    for method in METHODS:
        for name in ("whole", "stopped"):
            _prepare(model, method, runs.source(method), directory / f"{method}-{name}")
    fresh = [f"{directory / f'{method}-{mode}'}:{mode}" for method in METHODS for mode in ("whole", "stopped")]
    stopped = {method: directory / f"{method}-stopped" for method in METHODS}
    again = [f"{path}:refused={runs.source(method, other=True)}" for method, path in stopped.items()]
    again += [f"{path}:resumed" for path in stopped.values()]
    for arguments in (fresh, again):
        runs.results.update(_probe(directory, arguments))
    return runs


def _prepare(model: Path, method: str, source: str, folder: Path) -> None:
    register_schemas()
    overrides = [f"peft={method}", "experiment=smoke", "wandb.mode=disabled", "model=local", f"model.source={model}"]
    overrides += ["lr=0.01", "cluster.accelerator=cpu"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        plan = make_plan(cast(RunConfig, OmegaConf.to_object(compose("config", overrides))))
    folder.mkdir()
    config = replace(plan.config, model=replace(plan.config.model, source=source))
    write_worker_inputs(replace(plan, config=config), RunFolder(folder))


def _probe(directory: Path, arguments: list[str]) -> dict[str, Any]:
    out = directory / "losses.json"
    command = [sys.executable, str(ROOT / "tests/resume_probe.py"), str(out), *arguments]
    environment = client_environment("http://127.0.0.1:9", directory / "home", HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    results: dict[str, Any] = json.loads(out.read_text())
    return results


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_loses_nothing(method: str, resumed: Resumed) -> None:
    names = ("whole:whole", "stopped:stopped", "stopped:resumed")
    whole, stopped, continued = (resumed.results[f"{method}-{name}"] for name in names)
    assert list(whole) == ["1", "2", "3", "4"]
    assert list(stopped) == ["1", "2"]
    assert list(continued) == ["3", "4"]
    assert abs(whole["3"] - whole["1"]) > 1e-2, "training changed nothing, so this test shows nothing"
    for step, loss in continued.items():
        assert loss == pytest.approx(whole[step], abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_another_base_is_refused(method: str, resumed: Resumed) -> None:
    kind, message = resumed.results[f"{method}-stopped:refused"]
    assert kind == "BaseMismatchError"
    assert message == (
        f"{resumed.directory / f'{method}-stopped'}/checkpoints/step=2-last/weights was trained on "
        f"{resumed.source(method)}, and the recipe restores {resumed.source(method, other=True)}; restore from the "
        "first, or train in another folder"
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_after_a_resume_still_names_its_base(method: str, resumed: Resumed) -> None:
    weights = resumed.directory / f"{method}-stopped/checkpoints/step=4/weights"
    source = resumed.source(method)
    tokenizer = tokenizer_hash(resumed.directory / "model")
    assert tokenizer is not None
    assert json.loads((weights / "base_model.json").read_text()) == {"source": source, "tokenizer_hash": tokenizer}
    if method != "none":
        assert json.loads((weights / "adapter_metadata.json").read_text()) == {"model_ckpt_path": source}
