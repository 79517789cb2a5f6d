"""The choices of the group ``peft`` are full fine-tuning or have an entry under their name."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qwen_cl.config.peft import PeftConfig
from qwen_cl.config.store import register_schemas
from qwen_cl.models.adapter_methods import adapter_of, describe_method
from tests.conftest import ROOT

CHOICES = sorted(path.stem for path in (ROOT / "conf/peft").glob("[!_]*.yaml"))


def peft(choice: str) -> PeftConfig:
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config: PeftConfig = OmegaConf.to_object(compose("config", [f"peft={choice}"])).peft  # type: ignore[union-attr]
    return config


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_has_an_entry(choice: str) -> None:
    config = peft(choice)
    adapter = adapter_of(config)
    if type(config) is PeftConfig:
        assert adapter is None
        assert describe_method(config) == "full fine-tuning"
    else:
        assert adapter is not None
        assert adapter.method == choice
        assert describe_method(config).startswith(f"{adapter.entry.title}, rank 32, alpha 64, on linear_qkv, ")
