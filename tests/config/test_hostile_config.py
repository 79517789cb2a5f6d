"""A config from somewhere else cannot run code or write where it pleases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwen_cl.config.errors import UserError
from qwen_cl.config.hydra_errors import refuse_added_keys
from qwen_cl.config.saved import read_run_config, save_config
from qwen_cl.config.store import GROUPS, register_schemas
from tests.conftest import ROOT
from tests.support.composed_configs import compose_run
from tests.support.fault_table import Row

KEYS = ["", *(f"{group}." for group in GROUPS), "wandb."]
OUTSIDE = "../../outside"


def typed(*overrides: str) -> Any:
    """Compose as launch.py does, and raise its errors."""
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", list(overrides))
    refuse_added_keys(config)
    return OmegaConf.to_object(config)


@pytest.mark.parametrize("key", KEYS)
def test_nothing_named_by_a_config_is_called(key: str, tmp_path: Path, row: Row) -> None:
    """Neither of the command line, nor of the config.yaml in a run's folder."""
    mark = tmp_path / "called"
    with pytest.raises((UserError, HydraException, OmegaConfBaseException)):
        typed(f"+{key}_target_=os.system", f"++{key}command='touch {mark}'")
    path = tmp_path / "config.yaml"
    save_config(compose_run(), path)
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    place = config[key[:-1]] if key else config
    place.update(_target_="os.system", command=f"touch {mark}")
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"is not a run's config, or of another version: .*(_target_|command)"):
        read_run_config(path)
    assert not mark.exists()
    row("`_target_: os.system` in any group of a config", "refused with exit code 2: an unknown key", "nothing")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["retention=files", f"retention.eval_sets={{{OUTSIDE}: a.jsonl}}"], "must be letters, digits"),
        (["replay=files", f"replay.datasets={{{OUTSIDE}: a.jsonl}}"], "must be letters, digits"),
        (["task=continual", f"task.stages=[{{name: {OUTSIDE}}}]"], "becomes the name of a folder"),
        (["task=evaluate", "task.run=x", f"task.sets={{{OUTSIDE}: a.jsonl}}"], "must be letters, digits"),
        ([f"model=hub model.source=hf://{OUTSIDE}/x".split()[0], f"model.source=hf://{OUTSIDE}/x"], "hf://"),
        (["task=export", "task.run=x", f"task.push_to=hf://{OUTSIDE}"], "must read hf://ORG/NAME"),
    ],
)
def test_no_name_leads_out_of_its_folder(overrides: list[str], message: str, row: Row) -> None:
    from qwen_cl.models.reference import resolve

    with pytest.raises((UserError, HydraException), match=message):
        resolve(typed(*overrides).model.source)
    row("`../` in a name that becomes a file's", "refused with exit code 2", "nothing")
