"""Models saved by transformers 5 train, verify, generate and export alike with transformers 4.57 and 5.

The expected values were computed by transformers 5.24 (``python -m tests.support.v5``).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

from qwen_cl.config.errors import UserError
from qwen_cl.models.config_files import copy_small_files
from qwen_cl.models.hub.settings import HubSettings
from qwen_cl.models.normalized import write_normalized_files
from qwen_cl.models.reference import resolve
from qwen_cl.models.tokenizer.normalized import open_tokenizer
from tests.conftest import FEW, Launched, launch_once
from tests.support.asking import ask
from tests.support.exporting import run_export
from tests.support.hub import Hub
from tests.support.v5 import HERE, NAMES, ROWS, right_values, write_model
from tests.support.v5.texts import TEXTS

TRAINED = {"qwen2": "lora", "llama": "none"}


@pytest.fixture(scope="session", params=TRAINED)
def run(request: pytest.FixtureRequest, shared_directory: Path) -> tuple[str, Launched]:
    name = str(request.param)
    model = shared_directory / f"v5-{name}"
    if not model.exists():
        write_model(name, model)
    said = [
        "experiment=smoke",
        "task.max_steps=1",
        "task.checkpoint_interval=1",
        "task.sample_prompts=0",
        FEW,
        "model=local",
        f"model.source={model}",
        "model.verify=logits",
        f"peft={TRAINED[name]}",
        "retention=none",
        "cluster.accelerator=cpu",
        "wandb.mode=disabled",
    ]
    return name, launch_once(shared_directory, f"v5-{name}-run", *said, warm=True)


@pytest.mark.slow
def test_a_run_starts_at_the_right_loss_and_its_verification_agrees(run: tuple[str, Launched]) -> None:
    name, done = run
    assert done.returncode == 0, done.stderr[-3000:]
    first = json.loads(done.folder.metrics_file.read_text(encoding="utf-8").splitlines()[0])
    right = right_values()[name]
    assert first["val/target/tokens"] == right["tokens"]
    assert first["val/target/loss"] == pytest.approx(right["validation"], abs=1e-4)
    verified = done.folder.status().verified
    assert verified["loss"] == pytest.approx(verified["transformers"], abs=1e-4)


@pytest.mark.slow
def test_an_export_has_the_authors_files_and_the_loss_of_the_run(run: tuple[str, Launched], tmp_path: Path) -> None:
    name, done = run
    output, before, after = tmp_path / "export", tmp_path / "run.json", tmp_path / "export.json"
    run_export(f"task.run={done.folder.directory}", f"task.output={output}")
    model = done.folder.directory.parents[1] / f"v5-{name}"
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (output / file).read_bytes() == (model / file).read_bytes()
    said = ("task=evaluate", f"task.sets={{v: {ROWS}.validation.jsonl}}", "task.sequence_length=128")
    ask(*said, f"task.run={done.folder.directory}", f"task.output={before}")
    ask(*said, "model=local", f"model.source={output}", f"task.output={after}")
    losses = [_loss(before), _loss(after)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0] - right_values()[name]["validation"]) > 1e-3


@pytest.mark.slow
def test_a_checkpoint_as_the_next_model_hands_on_the_authors_files(run: tuple[str, Launched], tmp_path: Path) -> None:
    name, done = run
    if TRAINED[name] == "lora":
        pytest.skip("an adapter's checkpoint is no model")
    copy_small_files(done.folder.checkpoints / "step=1", tmp_path)
    model = done.folder.directory.parents[1] / f"v5-{name}"
    assert (tmp_path / "tokenizer_config.json").read_bytes() == (model / "tokenizer_config.json").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_has_the_right_loss(name: str, tmp_path: Path) -> None:
    model, output = write_model(name, tmp_path / "model"), tmp_path / "out.json"
    ask(
        "task=evaluate",
        "model=local",
        f"model.source={model}",
        f"task.sets={{v: {ROWS}.validation.jsonl}}",
        "task.sequence_length=128",
        f"task.output={output}",
    )
    found = json.loads(output.read_text(encoding="utf-8"))["sets"]["v"]
    right = right_values()[name]
    assert found["tokens"] == right["tokens"]
    assert found["loss"] == pytest.approx(right["validation"], abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_generation_writes_what_the_model_finds_likeliest(name: str, tmp_path: Path) -> None:
    model, prompts, output = write_model(name, tmp_path / "model"), tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text(TEXTS[0] + "\n", encoding="utf-8")
    said = ("task.raw=true", "task.max_new_tokens=8", f"task.output={output}")
    ask("task=generate", "model=local", f"model.source={model}", f"task.prompts={prompts}", *said)
    (line,) = output.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["completion"] == right_values()[name]["continued"]


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_has_the_ids_and_the_special_tokens_of_transformers_5(name: str) -> None:
    tokenizer, right = open_tokenizer(HERE / name), right_values()[name]
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == right["ids"]
    assert sorted(tokenizer.all_special_ids) == right["special"]


@pytest.mark.parametrize("name", NAMES)
def test_nemo_reads_the_same_tokenizer(name: str, tmp_path: Path) -> None:
    write_normalized_files(write_model(name, tmp_path / "model"), tmp_path / "tokenizer")
    tokenizer = AutoTokenizer(str(tmp_path / "tokenizer"), include_special_tokens=True)
    assert [tokenizer.text_to_ids(text) for text in TEXTS] == right_values()[name]["ids"]


@pytest.mark.parametrize("name", NAMES)
def test_normalizing_what_is_normalized_changes_nothing(name: str, tmp_path: Path) -> None:
    write_normalized_files(HERE / name, tmp_path / "once")
    write_normalized_files(tmp_path / "once", tmp_path / "twice")
    files = {path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "twice") for path in (tmp_path / "twice").rglob("*") if path.is_file()}
    for file in files:
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


def test_further_chat_templates_come_along(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(HERE / "qwen3")
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nx<|im_end|>\n"
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    assert tokenizer.apply_chat_template(messages, tools=tools, tokenize=False).startswith("of tools")
    copy_small_files(HERE / "qwen3", tmp_path)
    assert (tmp_path / "additional_chat_templates/tool_use.jinja").is_file()


def test_further_chat_templates_come_from_the_hub(tmp_path: Path) -> None:
    model, cache = write_model("qwen3", tmp_path / "model"), str(tmp_path / "cache")
    with Hub(tmp_path / "hub") as hub:
        commit = hub.publish("org/v5", model, "main")
        resolve("hf://org/v5", HubSettings(endpoint=hub.url, cache=cache))
    files = resolve(f"hf://org/v5@{commit}", HubSettings(offline=True, cache=cache))
    assert set(open_tokenizer(files.directory).chat_template) == {"default", "tool_use"}


@pytest.mark.slow
def test_a_run_folder_of_before_the_normalized_files_is_evaluated_right(
    run: tuple[str, Launched], tmp_path: Path
) -> None:
    """Export from an old run folder, which has only the author's files, in tokenizer/."""
    _, done = run
    folder = Path(shutil.copytree(done.folder.directory, tmp_path / "run"))
    said = ("task=evaluate", f"task.sets={{v: {ROWS}.validation.jsonl}}", "task.sequence_length=128")
    ask(*said, f"task.run={folder}", f"task.output={tmp_path / 'new.json'}")
    shutil.rmtree(folder / "tokenizer")
    (folder / "model_files").rename(folder / "tokenizer")
    ask(*said, f"task.run={folder}", f"task.output={tmp_path / 'old.json'}")
    assert _loss(tmp_path / "old.json") == _loss(tmp_path / "new.json")
    run_export(f"task.run={folder}", f"task.output={tmp_path / 'export'}")
    config = "tokenizer_config.json"
    assert (tmp_path / "export" / config).read_bytes() == (folder / "tokenizer" / config).read_bytes()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}, "needs code"),
        ({"tokenizer_class": "NoSuchTokenizer"}, "tokenizer_class (NoSuchTokenizer) is not in transformers"),
        ({"tokenizer_class": ["x"]}, "tokenizer_class"),
        ({"extra_special_tokens": "<x>"}, "extra_special_tokens (<x>) must be a list of tokens"),
        ({"extra_special_tokens": [1]}, "extra_special_tokens (1) must be the text of a token"),
        ({"eos_token": 3}, "eos_token (3) must be the text of a token"),
        ({"model_specific_special_tokens": ["<x>"]}, "must name tokens, each with its text"),
        ({"added_tokens_decoder": {"x": 1}}, "has no tokenizer that loads"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_in_one_line(
    edit: dict[str, object], message: str, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(HERE / "qwen2", tmp_path / "model"))
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "tokenizer_config.json").write_text(json.dumps({**config, **edit}), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        open_tokenizer(model)
    assert message in str(refused.value)
    assert str(model) in str(refused.value)
    assert "\n" not in str(refused.value)


def _loss(path: Path) -> float:
    return float(json.loads(path.read_text(encoding="utf-8"))["sets"]["v"]["loss"])
