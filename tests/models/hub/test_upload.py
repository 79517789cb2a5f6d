"""The upload of an export with ``task.push_to``, and its download with the real client."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants, snapshot_download
from transformers import AutoModelForCausalLM

from qwen_cl.config.errors import RunFailed, UserError
from tests.conftest import Launched, launch
from tests.support.exporting import run_export
from tests.support.hub import client_environment
from tests.support.models import DEMO_MODEL
from tests.support.upload_hub import UploadHub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    hub = UploadHub(tmp_path / "hub")
    with hub:
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


@pytest.fixture
def endpoint(hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the endpoint as HF_ENDPOINT does, which huggingface_hub read when it was imported."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HF_HUB_DISABLE_XET", True
    )  # since 1.0 every upload goes there, but this Hub lacks it


in_process = pytest.mark.usefixtures("endpoint")


def _push(trained: Launched, output: Path, *said: str) -> None:
    run_export(f"task.run={trained.folder.directory}", f"task.output={output}", *said)


def _content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_a_run_from_the_hub_goes_back_to_it(trained: Launched, hub: UploadHub, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir()}
    files["README.md"] = b"---\nlicense: other\nlicense_name: ours\nlicense_link: LICENSE\n---\n"
    commit = hub.publish("org/base", files, "main")
    run = Path(shutil.copytree(trained.folder.directory, tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["source"] = f"hf://org/base@{commit}"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    done = launch(
        "task=export",
        f"task.run={run}",
        "task.push_to=hf://alice/new",
        f"model.endpoint={hub.url}",
        directory=tmp_path / "outputs/export",
        environment=client_environment("http://127.0.0.1:9", tmp_path / "home", HF_TOKEN=hub.token),
    )
    assert done.returncode == 0, done.stderr
    uploaded = hub.commit_of("alice/new", "main")
    assert f"uploaded hf://alice/new@{uploaded} (private)" in done.stdout
    assert "alice/new" in hub.private
    back = Path(snapshot_download("alice/new", endpoint=hub.url, token=hub.token, cache_dir=tmp_path / "cache"))
    exported = _content(run / "export-merged")
    assert {name: data for name, data in _content(back).items() if name != ".gitattributes"} == exported
    here, there = (AutoModelForCausalLM.from_pretrained(path) for path in (run / "export-merged", back))
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        assert torch.equal(here(ids).logits, there(ids).logits)
    card = ModelCard.load(back / "README.md")
    assert (card.data.base_model, card.data.license, card.data.license_name) == ("org/base", "other", "ours")
    assert card.data.license_link == f"https://huggingface.co/org/base/blob/{commit}/LICENSE"
    assert commit in card.text


@in_process
def test_another_export_takes_the_place_of_the_last(trained: Launched, hub: UploadHub, tmp_path: Path) -> None:
    """Delete old shards, which would be loaded instead of the new ones."""
    _push(trained, tmp_path / "whole", "task.push_to=hf://org/model")
    assert "model.safetensors" in hub.files("org/model")
    _push(trained, tmp_path / "parts", "task.push_to=hf://org/model", "task.max_shard_size=300KB")
    held = hub.files("org/model")
    assert {name: data for name, data in held.items() if name != ".gitattributes"} == _content(tmp_path / "parts")
    with pytest.raises(UserError, match=r"hf://org/model\) holds config\.json, so it is not a repository for task"):
        _push(trained, tmp_path / "adapter", "task.push_to=hf://org/model", "task.format=adapter")
    assert not (tmp_path / "adapter").exists()


@in_process
def test_an_adapter_goes_into_a_repository_that_is_public(
    trained: Launched, hub: UploadHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.publish("org/adapter", {".gitattributes": b""}, "main")
    _push(trained, tmp_path / "adapter", "task.push_to=hf://org/adapter", "task.format=adapter")
    assert "upload  hf://org/adapter (public)" in capsys.readouterr().out
    held = hub.files("org/adapter")
    assert held["adapter_model.safetensors"] == (tmp_path / "adapter/adapter_model.safetensors").read_bytes()
    assert json.loads(held["adapter_config.json"])["r"] == 32


@in_process
def test_who_may_not_upload_hears_it_before_anything_is_written(
    trained: Launched, hub: UploadHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, target: str = "hf://org/model") -> None:
        with pytest.raises(UserError, match=re.escape(f"task.push_to ({target})") + f".*{message}") as caught:
            _push(trained, tmp_path / "model", f"task.push_to={target}")
        assert "\n" not in str(caught.value)
        assert hub.token not in str(caught.value)
        assert not (tmp_path / "model").exists()

    refused("this login may not upload to stranger; it may to alice, org", "hf://stranger/model")
    hub.role = "read"
    refused("the token is read-only")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    refused(r"the Hub refused the token it was given \(401\)")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    refused("not logged in; run `hf auth login`, or set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(r"did not answer \(ConnectionError\); check the network and HF_ENDPOINT")


@in_process
@pytest.mark.parametrize(
    ("refuse", "message"), [("create", "403"), ("lfs", "Error while uploading"), ("commit", "503|maintenance")]
)
def test_an_upload_that_fails_loses_nothing(
    refuse: str, message: str, trained: Launched, hub: UploadHub, tmp_path: Path
) -> None:
    hub.refuse = refuse
    output = tmp_path / "the model"
    with pytest.raises(RunFailed, match=f"the upload failed: .*({message})") as caught:
        _push(trained, output, "task.push_to=hf://org/model")
    assert "\n" not in str(caught.value)
    assert f"upload it with: hf upload org/model '{output}' --private" in str(caught.value)
    assert AutoModelForCausalLM.from_pretrained(output).num_parameters() > 0
