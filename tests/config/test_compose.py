"""Every file in conf/ composes into the typed config, keeps its values on the way, and is refused when wrong."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest
from omegaconf import DictConfig, OmegaConf

from qwen_cl.config.errors import UserError
from qwen_cl.config.help_text import read_help
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import load_config, save_config
from qwen_cl.config.store import GROUPS, register_schemas
from qwen_cl.planning.plan import make_plan
from qwen_cl.run import TASKS
from tests.support.composed_configs import MANDATORY, STAGE, compose_config, compose_run

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
CHOICES = sorted(CONF.glob("*/[!_]*.yaml"))
PARTS = sorted(CONF.glob("*/_*.yaml"))
"""What the choices of a group share; none is a choice."""
GROUP_CHOICES = [path for path in CHOICES if path.parent.name != "experiment"]
EXPERIMENTS = [path for path in CHOICES if path.parent.name == "experiment"]
# Eight devices do not share a batch of 16 in eights.
BESIDE = {"cluster=slurm": ["task.global_batch_size=64"]}
# Their line is explained by the one above it, or says all there is to say.
WITHOUT_COMMENT = {
    "data/jsonl.yaml": ["completion_field", "text_field"],
    "cluster/slurm.yaml": ["nodes"],
}


def choice_name(path: Path) -> str:
    return f"{path.parent.name}={path.stem}"


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or prefix.count(".") == 1:  # group.field: below are a user's own names
        return {prefix: node}
    return {key: value for name in node for key, value in leaves(node[name], f"{prefix}.{name}".lstrip(".")).items()}


def extended_by(path: Path) -> list[Path | str]:
    """Return what a file of a group extends, in order: the name of its schema, other choices, parts."""
    names = [str(name) for name in cast(DictConfig, OmegaConf.load(path)).get("defaults", []) if name != "_self_"]
    return [name if name in GROUPS[path.parent.name] else path.with_name(f"{name}.yaml") for name in names]


def schema_of(path: Path) -> str:
    first = extended_by(path)[0]
    return first if isinstance(first, str) else schema_of(first)


def written_in(path: Path) -> dict[str, Any]:
    """Return what a file of conf/ and the files it extends set, by full key; mandatory keys have the values above."""
    register_schemas()
    content = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path), resolve=True))
    content.pop("defaults", None)
    experiment = path.parent.name == "experiment"
    values = leaves(content if experiment else {path.parent.name: content})
    if "task.stages" in values and values["task.stages"] != "???":
        values["task.stages"] = [{**STAGE, **stage} for stage in values["task.stages"]]
    before: dict[str, Any] = {}
    for base in [] if experiment else extended_by(path):
        before |= {} if isinstance(base, str) else written_in(base)
    return {**before, **{key: MANDATORY[key] if value == "???" else value for key, value in values.items()}}


def test_there_are_files_to_test() -> None:
    assert {path.parent.name for path in GROUP_CHOICES} == set(GROUPS)
    assert len(GROUP_CHOICES) >= 20
    assert len(EXPERIMENTS) >= 2


@pytest.mark.parametrize("path", CHOICES, ids=choice_name)
def test_a_choice_composes_with_the_values_of_its_file(path: Path) -> None:
    composed = compose_config(choice_name(path), *BESIDE.get(choice_name(path), []))
    found = leaves(OmegaConf.to_container(composed, resolve=True, enum_to_str=True))
    written = written_in(path)
    assert {key: found.get(key) for key in written} == written
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)


@pytest.mark.parametrize("path", GROUP_CHOICES, ids=choice_name)
def test_a_choice_is_its_schema(path: Path) -> None:
    group = path.parent.name
    schema = schema_of(path)
    config = compose_run(choice_name(path), *BESIDE.get(choice_name(path), []))
    assert type(getattr(config, group)) is GROUPS[group][schema]
    # A key left to its type alone would have a value that no file shows.
    assert set(written_in(path)) == {f"{group}.{field.name}" for field in fields(GROUPS[group][schema])}


@pytest.mark.parametrize("path", sorted(CONF.glob("task/[!_]*.yaml")), ids=choice_name)
def test_a_task_has_a_function(path: Path) -> None:
    config = compose_run(choice_name(path))
    module, _, name = TASKS[type(config.task)].rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    assert list(parameters) == ["config", "task", "invocation"]


@pytest.mark.parametrize("path", CHOICES, ids=choice_name)
def test_a_saved_config_loads_equal(path: Path, tmp_path: Path) -> None:
    config = compose_run(choice_name(path), *BESIDE.get(choice_name(path), []))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("rank: 32", "rank: 0", r"peft\.rank \(0\) must be at least 1"),
        ("lr: 0.0005", "lr: -1.0", r"lr \(-1\.0\) must be above 0"),
        ("global_batch_size: 4", "global_batch_size: 3", r"global_batch_size \(3\) must be a multiple of .* = 2"),
    ],
)
def test_a_config_edited_by_hand_is_checked_again(before: str, after: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(compose_run(), path)
    text = path.read_text(encoding="utf-8")
    assert re.search(f"(^| ){before}$", text, re.MULTILINE)
    path.write_text(re.sub(f"(^| ){before}$", rf"\1{after}", text, flags=re.MULTILINE), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_config(path)


@pytest.mark.parametrize("path", sorted(CONF.glob("peft/[!_]*.yaml")), ids=choice_name)
def test_lr_follows_peft_unless_given(path: Path) -> None:
    assert compose_run(choice_name(path)).lr == written_in(path)["peft.default_lr"]
    assert compose_run(choice_name(path), "peft.default_lr=0.125").lr == 0.125
    assert compose_run(choice_name(path), "peft.default_lr=0.125", "lr=0.25").lr == 0.25


def test_full_training_and_adapters_differ_in_lr() -> None:
    assert compose_run("peft=none").lr < compose_run("peft=lora").lr


@pytest.mark.parametrize("path", sorted(CONF.glob("model/qwen2.5-*.yaml")), ids=choice_name)
def test_a_qwen_choice_is_the_model_it_is_named_after(path: Path) -> None:
    size = path.stem.removeprefix("qwen2.5-").upper()
    assert compose_run(choice_name(path)).model.source == f"hf://Qwen/Qwen2.5-{size}"


def help_text() -> str:
    return read_help(CONF)


def test_help_lists_exactly_the_choices_there_are() -> None:
    section = help_text().split("\nGroups ", 1)[1].split("\n\n", 1)[0]
    # A group's name stands two columns in; its choices follow a colon or, aligned with its text, on lines below.
    entries = re.findall(r"^  (\w+) +(.*(?:\n {3,}.*)*)", section, re.MULTILINE)
    listed = {name: {word.strip() for word in re.split(r"[,:\n]", text)} for name, text in entries}
    assert set(listed) == {path.parent.name for path in CHOICES}
    for group, words in listed.items():
        choices = {path.stem for path in CHOICES if path.parent.name == group}
        assert choices <= words
        # What is left is the group's own description.
        assert not [word for word in words - choices if "-" in word or word.startswith("qwen")]


def test_help_lists_exactly_the_keys_at_the_top() -> None:
    line = next(line for line in help_text().splitlines() if line.startswith("Keys at the top level"))
    listed = {key.strip() for key in line.split("): ", 1)[1].split(",")}
    file = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))
    assert isinstance(file, dict)
    assert listed == set(leaves({key: value for key, value in file.items() if key not in ("defaults", "hydra")}))


@pytest.mark.parametrize(
    "command", re.findall(r"^  python launch\.py((?: -{0,2}[\w.]+=\S+)+)", help_text(), re.MULTILINE)
)
def test_a_command_of_the_help_composes(command: str) -> None:
    compose_run(*shlex.split(command))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_no_file_names_a_class_to_instantiate(path: Path) -> None:
    assert "_target_" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path",
    [path for path in [*GROUP_CHOICES, *PARTS] if path.parent.name != "model"],
    ids=lambda path: str(path.relative_to(CONF)),
)
def test_every_key_says_what_it_does(path: Path) -> None:
    keys = without_comment(path)
    keys -= {key for base in extended_by(path) if isinstance(base, Path) for key in written_keys(base)}
    assert keys == set(WITHOUT_COMMENT.get(str(path.relative_to(CONF)), []))


def written_keys(path: Path) -> set[str]:
    return {key.partition(".")[2] for key in written_in(path)}


def without_comment(path: Path) -> set[str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"[a-z_]+:", line)]
    return {line.split(":", 1)[0] for line in lines if "#" not in line} - {"defaults"}


@pytest.mark.parametrize("path", [*GROUP_CHOICES, *PARTS], ids=lambda path: str(path.relative_to(CONF)))
def test_what_a_part_says_is_said_there_alone(path: Path) -> None:
    own = {str(key) for key in OmegaConf.load(path)} - {"defaults"}
    for part in set(extended_by(path)) & set(PARTS):
        assert not own & written_keys(cast(Path, part))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("peft.rank=0", "peft.rank (0) must be at least 1"),
        ("peft.alpha=-1", "peft.alpha (-1.0) must be above 0"),
        ("data=text data.validation_fraction=0", "data.validation_fraction (0.0) must be above 0"),
        ("data=text data.validation_fraction=1", "data.validation_fraction (1.0) must be below 1"),
        ("data=text data.workers=0", "data.workers (0) must be at least 1"),
        ("data=text data.path=' '", "data.path is empty; conf/data/text.yaml says what it takes"),
        ("data=text data.subset=' '", "data.subset is empty; write null"),
        ("peft.target_modules=[]", "peft.target_modules ([]) must name one or more of linear_qkv, linear_proj"),
        ("seed=-1", "seed (-1) must be at least 0"),
        ("seed=2147483648", "seed (2147483648) must be at most 2147483647"),
        ("task.max_steps=0", "task.max_steps (0) must be at least 1"),
        ("task.min_lr_ratio=1.5", "task.min_lr_ratio (1.5) must be at most 1"),
        ("task.warmup_steps=100", "task.warmup_steps (100) must be less than task.max_steps (40); lower it"),
        ("task.sample_prompts=-1", "task.sample_prompts (-1) must be at least 0"),
        ("task.sample_tokens=0", "task.sample_tokens (0) must be at least 1"),
        ("task.sequence_length=1", "task.sequence_length (1) must be at least 2"),
        ("cluster.devices=0", "cluster.devices (0) must be at least 1"),
        ("wandb.tags=['']", "wandb.tags ('') must have 1 to 64 characters"),
        (f"wandb.tags=[{'a' * 65}]", f"wandb.tags ('{'a' * 65}') must have 1 to 64 characters; shorten it"),
        ("model.source=' '", "model.source is empty; write hf://ORG/NAME"),
        ("model.cache=' '", "model.cache is empty; name a directory, or null"),
        ("model.endpoint=hub.example.org", "model.endpoint (hub.example.org) must be a URL such as https://"),
        ("model.endpoint=file:///etc", "model.endpoint (file:///etc) must be a URL such as https://"),
        ("model.endpoint='https://h/?a=b'", "model.endpoint (https://h/?a=b) must be a URL such as https://"),
        ("model.endpoint=https://me:secret@h", "model.endpoint must not hold a user or password: it is recorded"),
    ],
)
def test_a_value_out_of_its_range_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        compose_run(*re.split(" (?=data)", override))
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("hf://org/name", "names no commit"),
        ("hf://org/name@main", "names no commit"),
        ("hf://org/name@0123abc", "names no commit"),
        ("hf://org/name@" + "A" * 40, "names no commit"),
        ("hf://org/name@" + "a" * 41, "names no commit"),
        ("/models/mine", "is a directory, which has no commit"),
    ],
)
def test_locked_takes_a_commit_and_nothing_else(source: str, reason: str) -> None:
    with pytest.raises(UserError) as refused:
        compose_run("model=hub", f"model.source={source}", "model.require_pinned_revision=true")
    assert str(refused.value).startswith(f"model.source ({source}) {reason}, and model.require_pinned_revision=true")
    pinned = "hf://org/name@" + "a" * 40
    assert (
        compose_run("model=hub", f"model.source={pinned}", "model.require_pinned_revision=true").model.source == pinned
    )


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    shutil.copy(ROOT / "qwen_cl/demo/model/config.json", tmp_path)
    with pytest.raises(UserError) as refused:
        make_plan(compose_run("model=local", f"model.source={tmp_path}"))
    assert str(refused.value) == f"{tmp_path} holds no *.safetensors; weights are read from safetensors only"


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"devices \(1\) is more than the available GPUs \(0\).*accelerator=cpu$"):
        make_plan(compose_run("cluster.accelerator=gpu"))


def test_cfg_job_prints_the_composed_values(tmp_path: Path) -> None:
    arguments = ["experiment=smoke", "peft.rank=8", "lr=3e-4"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *arguments, "--cfg", "job", "--resolve"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = OmegaConf.to_container(compose_config(*arguments), resolve=True, enum_to_str=True)
    assert OmegaConf.to_container(OmegaConf.create(done.stdout)) == expected
    assert list(tmp_path.iterdir()) == []
