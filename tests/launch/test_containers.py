"""The specifications for Docker, Kubernetes and SkyPilot, as these read them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_cl.config.errors import UserError
from qwen_cl.launch.containers import render_container
from qwen_cl.runs.folder import RunFolder
from tests.conftest import ROOT, launch
from tests.support.composed_configs import compose_run

OVERRIDES = ["experiment=smoke", "name=a b", "lr=1e-3"]
FOLDER = RunFolder("/runs/My Runs/20250101-120000")
HERE = ["cluster=local", "cluster.accelerator=gpu", "cluster.devices=2", "cluster.tensor_parallel=2"]
HERE += ["cluster.pipeline_parallel=1", "cluster.context_parallel=1", "cluster.sequence_parallel=False"]
HERE += ["cluster.precision=bf16", "cluster.timeout_minutes=30.0"]


def render(choice: str, *more: str) -> str:
    said = [f"cluster={choice}", "cluster.image=nemo:25.07", "cluster.devices=2", "cluster.tensor_parallel=2"]
    said += ["cluster.precision=bf16", *more]
    return render_container(compose_run(*OVERRIDES, *said), FOLDER, [*OVERRIDES, *said, "dry_run=true"])[1]


@pytest.fixture(autouse=True)
def canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "canary")


def test_docker_runs_the_same_command_with_what_it_reads() -> None:
    text = render("docker", "cluster.mounts=['/data:/data:ro']")
    words = shlex.split(text)
    image = words.index("nemo:25.07")
    assert words[:3] == ["docker", "run", "--rm"]
    options = words[3:image]
    assert {"--gpus=2", "--volume=/data:/data:ro", f"--volume={ROOT}:{ROOT}", f"--workdir={ROOT}"} <= set(options)
    assert {f"--volume={FOLDER.directory}:{FOLDER.directory}", "--env=WANDB_API_KEY", "--env=HF_TOKEN"} <= set(options)
    assert words[image + 1 :] == ["python", "launch.py", f"hydra.run.dir='{FOLDER.directory}'", *OVERRIDES, *HERE]
    assert "canary" not in text
    assert "--gpus" not in render("docker", "cluster.accelerator=cpu")


def test_kubernetes_gets_a_train_job() -> None:
    text = render("kubernetes", "cluster.secret=keys", "cluster.volume_claim=disk", "cluster.namespace=us")
    job = yaml.safe_load(text)
    assert (job["kind"], job["metadata"]) == (
        "TrainJob",
        {"name": "qwen-cl-my-runs-20250101-120000", "namespace": "us"},
    )
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (1, 1, "nemo:25.07")
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "2"}
    shell, flag, line = trainer["command"]
    assert (shell, flag) == ("bash", "-c")
    words = ["cd", "/workspace/qwen_cl", "&&", "exec", "python", "launch.py"]
    assert shlex.split(line) == [*words, "hydra.run.dir='/outputs/My Runs/20250101-120000'", *OVERRIDES, *HERE]
    assert {entry["name"]: entry["valueFrom"]["secretKeyRef"]["name"] for entry in trainer["env"]} == {
        "WANDB_API_KEY": "keys",
        "HF_TOKEN": "keys",
    }
    (pod,) = [override["spec"] for override in job["spec"]["podTemplateOverrides"]]
    assert pod["volumes"] == [{"name": "outputs", "persistentVolumeClaim": {"claimName": "disk"}}]
    assert pod["containers"][0]["volumeMounts"] == [{"name": "outputs", "mountPath": "/outputs"}]
    assert "canary" not in text
    bare = yaml.safe_load(render("kubernetes", "cluster.accelerator=cpu"))["spec"]
    assert "podTemplateOverrides" not in bare
    assert (bare["trainer"]["env"], bare["trainer"].get("resourcesPerNode")) == ([], None)


def test_skypilot_gets_a_task() -> None:
    text = render(
        "skypilot", "cluster.infra=aws/us-east-1", "cluster.setup='pip install -e .'", "cluster.use_spot=true"
    )
    task: dict[str, Any] = yaml.safe_load(text)
    run = shlex.split(task.pop("run"))
    assert run == ["python", "launch.py", "hydra.run.dir='outputs/My Runs/20250101-120000'", *OVERRIDES, *HERE]
    assert task == {
        "name": "qwen-cl-my-runs-20250101-120000",
        "workdir": str(ROOT),
        "num_nodes": 1,
        "resources": {
            "image_id": "docker:nemo:25.07",
            "use_spot": True,
            "accelerators": {"H100": 2},
            "infra": "aws/us-east-1",
        },
        "secrets": {"WANDB_API_KEY": None, "HF_TOKEN": None},
        "setup": "pip install -e .",
    }
    assert "canary" not in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.image=' '", "cluster.image is empty; name an image"),
        (
            "cluster.accelerator=auto",
            "cluster.accelerator (auto) cannot be detected from this machine; write gpu or cpu",
        ),
    ],
)
def test_what_no_container_could_be_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        compose_run("cluster=docker", override)
    assert str(refused.value).startswith(message)


@pytest.mark.slow
def test_a_run_that_is_not_submitted_says_so(tmp_path: Path) -> None:
    done = launch("cluster=kubernetes", "cluster.image=nemo:25.07", directory=tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr == "cluster=kubernetes cannot be submitted; dry_run=true prints the files to submit\n"
    assert list(tmp_path.iterdir()) == []
