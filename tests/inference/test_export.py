"""``task=export``: the files it writes, and the runs it refuses."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_cl.config.errors import UserError
from qwen_cl.models.export.model_card import base_license
from qwen_cl.models.fingerprint import fingerprint
from tests.conftest import ROOT, Launched, launch
from tests.support.exporting import composed, run_export, seal
from tests.support.models import DEMO_MODEL


@pytest.fixture
def run(trained: Launched, tmp_path: Path) -> Path:
    """Return a copy of the run that a test may corrupt."""
    return Path(shutil.copytree(trained.folder.directory, tmp_path / "run", ignore=shutil.ignore_patterns("wandb")))


@pytest.fixture
def weights(run: Path) -> Path:
    return run / "checkpoints/step=40/weights"


def test_the_command_writes_the_whole_model_and_nothing_else(trained: Launched, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    done = launch(
        "task=export",
        f"task.run={trained.folder.directory}",
        f"task.output={tmp_path / 'exported'}",
        "task.max_shard_size=300KB",
        directory=outputs / "export",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"wrote {tmp_path / 'exported'}" in done.stdout
    assert "writing model-00001-of-000" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} <= {"exported", "outputs"}
    assert not outputs.exists() or not any(outputs.iterdir())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert model.config.vocab_size >= len(tokenizer)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "exported").iterdir()} == {0o644}


def test_the_card_says_what_it_is(trained: Launched, run: Path, tmp_path: Path) -> None:
    status = trained.folder.status()
    base = Path(shutil.copytree(DEMO_MODEL, tmp_path / "my|base"))
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n# A base\n")
    _edit_config(run, lambda config: config["model"].update(source=str(base)))
    run_export(f"task.run={run}")
    run_export(f"task.run={run}", "task.format=adapter")
    for name, library in (("export-merged", "transformers"), ("export-adapter", "peft")):
        card = ModelCard.load(run / name / "README.md")
        card.validate = None  # it would send a request to the Hub
        assert (card.data.license, card.data.license_name, card.data.library_name) == ("other", "tiny", library)
        assert card.data.tags == ["qwen_cl", "lora"]
        for fact in (
            "my\\|base",
            status.data_sha256,
            "instructions.train.jsonl",
            "| optimizer steps | 40 |",
            "rank 32",
        ):
            assert fact in card.text
        assert str(tmp_path) not in card.content


def test_a_base_without_a_card_has_no_invented_license(tmp_path: Path) -> None:
    model = composed("model=local", f"model.source={tmp_path}").model
    assert base_license(model) == {}
    for content in ("no front matter", "---\n: [\n---\n", "---\nlicense: [a, b]\n---\n", "---\n- list\n---\n"):
        (tmp_path / "README.md").write_text(content)
        assert base_license(model) == {}
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert base_license(model) == {"license": "apache-2.0"}


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    moved = Path(shutil.copytree(DEMO_MODEL, tmp_path / "moved"))
    before = fingerprint(DEMO_MODEL)
    (moved / "README.md").write_text("another card")
    assert fingerprint(moved) == before
    tensors = load_file(moved / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, moved / "model.safetensors")
    trained_on = fingerprint(moved)
    (moved / "config.json").write_text((moved / "config.json").read_text().replace("1e-06", "1e-05"))
    assert len({before, trained_on, fingerprint(moved)}) == 3


def test_fp16_that_would_overflow_is_refused(run: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(DEMO_MODEL, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 65536.0)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    _edit_config(run, lambda config: config["model"].update(source=str(base)))
    _edit_status(run, model_fingerprint=None)
    with pytest.raises(UserError, match=r"task\.dtype=fp16: model\.norm\.weight has values past 65504"):
        run_export(f"task.run={run}", "task.dtype=fp16")
    assert not list(run.glob("*export*"))


def _edit_config(run: Path, change: Callable[[Any], None]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    change(config)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def _edit_status(run: Path, **changes: Any) -> None:
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, **changes}))


def _full(run: Path) -> None:
    _edit_config(run, lambda config: config.update(peft={"type": "none", "default_lr": 1e-5}))


def _unfinished(run: Path) -> None:
    (run / "checkpoints/step=40/manifest.json").unlink()


BAD_RUNS: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "no folder": (shutil.rmtree, [], "is not the folder of a run: it has no config.yaml"),
    "not a run's config": (
        lambda run: (run / "config.yaml").write_text("hello: world\n"),
        [],
        r"config\.yaml is not a run's config",
    ),
    "not YAML": (lambda run: (run / "config.yaml").write_text("a: [\n"), [], r"config\.yaml is not a run's config"),
    "another version": (
        lambda run: _edit_config(run, lambda config: config["model"].update(no_such_key=1)),
        [],
        r"config\.yaml is not a run's config, or of another version: .*no_such_key",
    ),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), [], "has no complete checkpoint in checkpoints/"),
    "unfinished": (_unfinished, [], "has no complete checkpoint in checkpoints/"),
    "unknown step": (lambda run: None, ["task.step=50"], r"task\.step \(50\) has no complete .*; there are 40"),
    "full run": (
        _full,
        ["task.format=adapter"],
        "this run used full fine-tuning and has no adapter",
    ),
    "adapter taken for a model": (_full, [], "lacks embedding.word_embeddings.weight; it is not a checkpoint of"),
    "another rank": (
        lambda run: _edit_config(run, lambda config: config["peft"].update(rank=16)),
        [],
        r"linear_in\.weight has shape \(4, 32, 192\) where the run's config requires \(4, 16, 192\)",
    ),
    "fewer modules": (
        lambda run: _edit_config(run, lambda config: config["peft"].update(target_modules=["linear_qkv"])),
        [],
        r"holds .*adapter.*, which is not in the run's config\.yaml",
    ),
    "output exists": (
        lambda run: (run / "export-merged").mkdir(),
        [],
        r"export-merged\) exists; choose another",
    ),
    "output under a file": (
        lambda run: None,
        ["task.output={run}/status.json/x"],
        r"task\.output \(.*\): .*status\.json is a file; choose another folder",
    ),
    "base gone": (
        lambda run: _edit_config(run, lambda config: config["model"].update(source="/no/such/base")),
        [],
        "the base model of this run, /no/such/base, is missing; restore it",
    ),
    "base changed": (
        lambda run: _edit_status(run, model_fingerprint="0" * 64),
        [],
        "has changed since the run, and its weights no longer match; restore it",
    ),
    "a key of the run": (lambda run: None, ["lr=0.1"], r"lr=0\.1 has no effect: task=export reads"),
    "a group of the run": (lambda run: None, ["peft=dora"], "peft=dora has no effect: task=export reads"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(name: str, run: Path) -> None:
    corrupt, overrides, message = BAD_RUNS[name]
    corrupt(run)
    before = set(run.iterdir()) if run.exists() else set()
    with pytest.raises(UserError, match=message) as caught:
        run_export(f"task.run={run}", *(part.format(run=run) for part in overrides))
    assert "\n" not in str(caught.value)
    assert (set(run.iterdir()) if run.exists() else set()) == before


CORRUPTED_WEIGHTS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no metadata": (
        lambda weights: (weights / ".metadata").unlink(),
        r"step=40 is corrupted: weights/\.metadata is missing; restore the file",
        r"\.metadata cannot be read: there is no distributed checkpoint",
    ),
    "metadata of zeros": (
        lambda weights: (weights / ".metadata").write_bytes(bytes(100)),
        r"is corrupted: weights/\.metadata has 100 bytes of \d+",
        r"\.metadata is not the metadata of a checkpoint",
    ),
    "shard gone": (
        lambda weights: (weights / "__0_0.distcp").unlink(),
        r"is corrupted: weights/__0_0\.distcp is missing",
        r"(cannot be read|is missing).*checkpoint is",
    ),
    "shard cut": (
        lambda weights: os.truncate(weights / "__0_0.distcp", 1000),
        r"is corrupted: weights/__0_0\.distcp has 1000 bytes of \d+",
        r"(cannot be read|is shorter).*checkpoint is",
    ),
}


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", CORRUPTED_WEIGHTS)
def test_a_checkpoint_that_is_not_what_was_saved_is_refused(name: str, sealed: bool, weights: Path, run: Path) -> None:
    corrupt, *messages = CORRUPTED_WEIGHTS[name]
    corrupt(weights)
    if sealed:
        seal(weights.parent)
    with pytest.raises(UserError, match=messages[sealed]):
        run_export(f"task.run={run}")
    assert not list(run.glob("*export*"))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["task.push_to=org/name"], r"task\.push_to \(org/name\) must read hf://ORG/NAME"),
        (["task.push_to=hf://org/name@main"], "must read hf://ORG/NAME"),
        (["task.push_to=hf://org/a--b"], "is not a valid repository name: Cannot have --"),
        (["task.max_shard_size=0GB"], "must read like 5GB or 500MB"),
        (["task.format=adapter", "task.dtype=bf16"], r"task\.dtype \(bf16\) is for task\.format=merged"),
        (["task.output=''"], r"task\.output is empty"),
    ],
)
def test_keys_with_other_values_than_they_take(said: list[str], message: str, trained: Launched) -> None:
    with pytest.raises(UserError, match=message):
        run_export(f"task.run={trained.folder.directory}", *said)


class _Canary:
    """An object that runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_metadata_that_would_run_code_does_not(weights: Path, run: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (weights / ".metadata").write_bytes(pickle.dumps(_Canary(canary)))
    with pytest.raises(UserError, match=r"step=40 is corrupted: weights/\.metadata has"):
        run_export(f"task.run={run}")
    seal(weights.parent)
    with pytest.raises(UserError, match=r"\.metadata is not the metadata of a checkpoint"):
        run_export(f"task.run={run}")
    assert not canary.exists()


def test_a_shard_that_would_run_code_does_not(weights: Path, run: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for path in weights.glob("*.distcp"):
        size = path.stat().st_size
        path.write_bytes(pickle.dumps(_Canary(canary)).ljust(size, b"\0"))
    with pytest.raises(UserError, match=r"step=40 is corrupted: weights/__0_0\.distcp does not match its checksum"):
        run_export(f"task.run={run}")
    seal(weights.parent)
    with pytest.raises(UserError, match=r"checkpoint is"):
        run_export(f"task.run={run}")
    assert not canary.exists()


def test_a_running_run_gives_its_latest_complete_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _edit_status(run, state="RUNNING")
    shutil.copytree(run / "checkpoints/step=40", run / "checkpoints/step=150")
    (run / "checkpoints/step=150/manifest.json").unlink()
    run_export(f"task.run={run}", "task.format=adapter", f"task.output={tmp_path / 'deep/adapter'}")
    assert "step 40 of a run that is RUNNING" in capsys.readouterr().out
    saved, live = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "deep/adapter", run / "adapter")
    )
    assert saved.keys() == live.keys()
    assert all(torch.equal(saved[name], live[name]) for name in live)


def test_dry_run_writes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_export(f"task.run={run}", "dry_run=true")
    assert str(run / "export-merged") in capsys.readouterr().out
    assert not list(run.glob("*export*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"needs to mount a file system of 200 KB, which this user may not: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_is_too_small(trained: Launched, small_disk: Path) -> None:
    (small_disk / ".model-killed").mkdir()
    with pytest.raises(
        UserError,
        match=r"needs 5\.01 MB and \d{3}\.\d\d kB are free there \(an export that was killed left \.model-killed\)",
    ):
        run_export(f"task.run={trained.folder.directory}", f"task.output={small_disk / 'model'}")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="cannot be written to; choose another folder"):
        run_export(f"task.run={trained.folder.directory}", f"task.output={small_disk / 'model'}")


STOP_INSIDE = """
import os, sys
from pathlib import Path
from qwen_cl.files.atomic_folder import atomic_directory
with atomic_directory(Path(sys.argv[2])) as temporary:
    (temporary / "half").write_text("written")
    os.kill(os.getpid(), int(sys.argv[1]))
"""
STOP_AN_EXPORT = """
import os, sys
from qwen_cl.models.export.merged import MergedModel
from tests.support.exporting import composed, run_export, seal
stock = MergedModel.read
def read(model, name):
    if name == "model.norm.weight":
        os.kill(os.getpid(), int(sys.argv[1]))
    return stock(model, name)
MergedModel.read = read
run_export(*sys.argv[2:])
"""


def _stopped(script: str, number: signal.Signals, *arguments: str) -> str:
    command = [sys.executable, "-c", script, str(int(number)), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stdout


def test_stopped_in_the_middle_it_leaves_nothing(trained: Launched, tmp_path: Path) -> None:
    _stopped(STOP_INSIDE, signal.SIGINT, str(tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []
    said = [f"task.run={trained.folder.directory}", f"task.output={tmp_path / 'model'}", "task.max_shard_size=200KB"]
    assert "writing model-00001" in _stopped(STOP_AN_EXPORT, signal.SIGTERM, *said)
    assert list(tmp_path.iterdir()) == []


def test_killed_it_leaves_what_is_in_nobodys_way(trained: Launched, tmp_path: Path) -> None:
    _stopped(STOP_INSIDE, signal.SIGKILL, str(tmp_path / "model"))
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".model-")
    run_export(f"task.run={trained.folder.directory}", f"task.output={tmp_path / 'model'}")
    assert {path.name for path in tmp_path.iterdir()} == {"model", left.name}
