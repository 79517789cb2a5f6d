"""Arguments from a shell reach the config as they were typed, and printed overrides can be pasted back."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from qwen_cl.config.errors import UserError
from qwen_cl.config.override_text import printed_path, quote_arguments, quote_free_text
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import load_config, save_config
from qwen_cl.config.store import register_schemas
from tests.conftest import ROOT, launch

TEXTS = [
    "日本語.jsonl", "a=b", "my file (1).txt", "runs/日本 (1)=a$b'c", "a,b", "[x]", "{a: b}", "it's", 'say "x"', "-x",
    "😀", "007", "1e3", "true", "12", "1_000", "~/x", "a#b", "a;b&c|d", "back\\", "a\\'b", "a\nb", " a ", "100%", "a!",
    "été", "x: y", "/tmp/a`b`c", "*.jsonl", "choice", "'a' and 'b'", "(", "]",
]  # fmt: skip
KEYS = ["name", "model.source", "data.path", "task.run", "task.prompt", "hydra.run.dir", "wandb.entity", "task.output"]
PROMPTS = [
    *TEXTS,
    "${x}",
    "costs ${price}, or \\${y} and \\\\${z}",
    "${",
    "春、夏, 秋",
    "null hypothesis",
    "- a\n- b",
    "$HOME",
]


def config_of(*arguments: str) -> RunConfig:
    """Compose as launch.py does."""
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return cast(RunConfig, OmegaConf.to_object(compose("config", quote_arguments(list(arguments)))))


def parsed(argument: str) -> Any:
    return OverridesParser.create().parse_override(argument)


@pytest.mark.parametrize("key", KEYS)
def test_text_reaches_hydra_as_it_was_typed(key: str) -> None:
    for text in TEXTS:
        once = quote_free_text(f"{key}={text}")
        assert str(parsed(once).value()) == text
        assert quote_free_text(once) == once


@pytest.mark.parametrize("text", PROMPTS)
def test_a_prompt_reaches_the_process_that_answers_it(text: str, tmp_path: Path) -> None:
    """Check the config that the process reads from a file."""
    config = config_of("task=generate", f"task.prompt={text}")
    save_config(config, tmp_path / "config.yaml")
    for each in (config, load_config(tmp_path / "config.yaml")):
        assert each.task.prompt == text  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "argument",
    [
        "lr=1e-4", "peft.rank=8", "peft=lora", "name=null", "name='a b'", "name=abc", "wandb.tags=[a,b]", "~data", "-m",
        "data.path=${oc.env:HOME}/x", "+x.y=1", "task.micro_batch_size=auto", "lr=tag(log,interval(1e-5,1e-3))",
        "name=choice(a,b)", "data.path=a\\,b", "task.sets={a: b.txt}", "dry_run=true", "data.path=glob(*)",
    ],
)  # fmt: skip
def test_what_hydra_reads_right_stays(argument: str) -> None:
    assert quote_free_text(argument) == argument
    assert quote_free_text(argument, multirun=True) == argument


def test_a_comma_is_a_sweep_only_in_one() -> None:
    assert quote_arguments(["-m", "name=a,b", "lr=1,2"]) == ["-m", "name=a,b", "lr=1,2"]
    assert quote_arguments(["name=a,b", "lr=1,2"]) == ["name='a,b'", "lr=1,2"]
    assert quote_arguments(["-m", "data.path=日本.jsonl,b (1).jsonl"])[1] == "data.path='日本.jsonl','b (1).jsonl'"
    assert parsed(quote_free_text("data.path=日本,b", multirun=True)).is_sweep_override()


def test_parts_of_lists_and_mappings() -> None:
    config = config_of("task=evaluate", "task.sets={english: en.txt, japanese: 日本 (1).txt}", "wandb.tags=[日本, a b]")
    assert config.task.sets == {"english": "en.txt", "japanese": "日本 (1).txt"}  # type: ignore[attr-defined]
    assert config.wandb.tags == ["日本", "a b"]


def test_an_interpolation_among_other_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/data")
    assert config_of("name=${oc.env:WHERE}/日本 (1)").name == "/data/日本 (1)"


def test_what_a_shell_split_is_shown_quoted() -> None:
    with pytest.raises(UserError) as caught:
        quote_arguments(["data.path=my", "file (1).jsonl"])
    message, _, command = str(caught.value).rpartition(": ")
    assert message.startswith("file (1).jsonl: an override reads KEY=VALUE")
    assert quote_arguments(shlex.split(command)) == ["data.path='my file (1).jsonl'"]


@pytest.mark.parametrize("folder", [*TEXTS, "a${b}c", "\\${x}"])
def test_a_printed_folder_can_be_pasted(folder: str) -> None:
    line = printed_path("hydra.run.dir", folder)
    pasted = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True).stdout
    (argument,) = quote_arguments(pasted.rstrip("\0").split("\0"))
    node = OmegaConf.create({"dir": parsed(argument).value()})
    assert str(node.dir) == folder


@pytest.mark.slow
def test_the_launcher_itself(tmp_path: Path) -> None:
    """An odd folder and name, unquoted for Hydra."""
    folder = tmp_path / "日本 (1)=a$b'c"
    done = launch("task=inspect", "name=試し, (2)", directory=folder)
    assert done.returncode == 0, done.stderr
    refused = launch("task=generate", "task.run=/no/日本 (1)", "task.prompt=${x}", directory=folder)
    assert refused.returncode == 2
    assert refused.stderr.startswith("task.run (/no/日本 (1)) is not the folder of a run")
