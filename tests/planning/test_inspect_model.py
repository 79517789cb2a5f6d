"""``task=inspect``: facts of a model without its weights, and what this machine can do with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import Launched, launch
from tests.support.hub import Hub, client_environment
from tests.support.models import DEMO_MODEL, save_random_model


def facts(done: Launched) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^ *(\S+)  (.*)$", done.stdout, flags=re.MULTILINE))


def layouts(done: Launched) -> list[tuple[str, ...]]:
    """tensor_parallel, pipeline_parallel and devices of each row of the table."""
    rows = [re.findall(r"[^│┃]+", line) for line in done.stdout.splitlines() if line.startswith("│")]
    return [tuple(cell.strip() for cell in row[:3]) for row in rows]


@pytest.mark.slow
def test_a_directory(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", family="qwen3", heads=6, kv_groups=3, layers=4, tied=False)
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n", encoding="utf-8")
    done = launch("task=inspect", "model=local", f"model.source={model}", directory=tmp_path / "outputs/run")
    found = facts(done)
    assert found["model"] == str(model)
    assert found["architecture"] == "qwen3 (Qwen3)"
    assert found["attention"] == "6 heads of 16, 3 KV groups"
    assert found["license"] == "apache-2.0"
    assert found["weights"].endswith(" (47 tensors)")
    assert found["tokenizer"] == "1,536 tokens, with a chat template"
    assert (found["tensor_parallel"], found["pipeline_parallel"]) == ("1, 3", "1, 2, 4")
    assert layouts(done) == [("1", "1", "1"), ("1", "2", "2"), ("1", "4", "4")]
    assert not (tmp_path / "outputs/run").exists()


@pytest.mark.slow
def test_a_model_of_the_hub_without_fetching_its_weights(tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir()}
    files["README.md"] = b"---\nlicense: mit\n---\n"
    with Hub(tmp_path / "hub") as hub:
        commit = hub.publish("org/tiny", files, "main")
        environment = client_environment(hub.url, tmp_path / "home")
        arguments = ["task=inspect", "model=hub", "model.source=hf://org/tiny", "peft=dora"]
        done = launch(*arguments, directory=tmp_path / "run", environment=environment)
        fetched = hub.fetched()
    found = facts(done)
    assert found["model"] == f"hf://org/tiny@{commit}"
    assert found["commit"] == commit
    assert found["parameters"] == "2,362,304, of them 786,432 in the embedding, which is also the output layer"
    assert found["license"] == "mit"
    assert found["weights"] == "4.73 MB, bfloat16"
    assert "DoRA r32" in done.stdout
    assert "model.safetensors" not in fetched


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", layers=1)
    (model / "model.safetensors").unlink()
    done = launch("task=inspect", "model=local", f"model.source={model}", directory=tmp_path / "run")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "holds no *.safetensors" in done.stderr
