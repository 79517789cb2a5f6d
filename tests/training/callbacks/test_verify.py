"""``model.verify=logits`` stops a run that would train another function; test_initial_loss.py shows that it passes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qwen_cl.config.run import RunConfig
from qwen_cl.config.store import register_schemas
from qwen_cl.planning.plan import make_plan
from qwen_cl.runs.folder import RunFolder
from qwen_cl.runs.status import State
from qwen_cl.training.prepare import write_worker_inputs
from tests.conftest import ROOT
from tests.support import verify_probe
from tests.support.models import save_random_model
from tests.support.ranks import run_ranks


def test_one_changed_row_of_one_weight_stops_the_run_before_its_first_step(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", vocab_size=1537)
    register_schemas()
    overrides = ["experiment=smoke", "wandb.mode=disabled", "model=local", f"model.source={model}"]
    overrides += ["model.verify=logits", "cluster.accelerator=cpu"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        plan = make_plan(cast(RunConfig, OmegaConf.to_object(compose("config", overrides))))
    folder = RunFolder(tmp_path / "run")
    folder.directory.mkdir()
    write_worker_inputs(plan, folder)
    folder.update_status(state=State.RUNNING, step=0)
    done = run_ranks(verify_probe.main, str(folder.directory))
    assert done.returncode == 1, done.log[-3000:]
    status = folder.status()
    assert (status.state, status.step) == ("FAILED", 0)
    verified = status.verified
    assert abs(verified["loss"] - verified["transformers"]) > 1e-3
    assert re.fullmatch(
        r"VerificationError: model\.verify: the loss of a probe batch is [\d.]+ and transformers has [\d.]+ for the "
        r"same files and tokens \(allowed difference: 0\.001\); the loaded model is not the published one",
        str(status.reason),
    )
    assert not list(folder.checkpoints.glob("*"))
