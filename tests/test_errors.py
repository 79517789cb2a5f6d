"""Invalid input: one clear message, exit code 2, no traceback, no files left."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_cl.config.help_text import read_help
from tests.conftest import ROOT
from tests.support.ranks import run_ranks

GOOD = b'{"prompt": "a", "completion": "b"}\n'


def refuse(*arguments: str, directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return _refused(done.returncode, done.stdout, directory)


def refuse_forked(*arguments: str, directory: Path) -> str:
    """Return the message as ``refuse`` does, from a process that has imported everything."""
    ended = run_ranks(_launch, arguments, directory)
    return _refused(ended.returncode, ended.log, directory)


def _launch(arguments: tuple[str, ...], directory: Path) -> None:
    os.chdir(directory)
    sys.argv = [str(ROOT / "launch.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _refused(returncode: int, said: str, directory: Path) -> str:
    """Return the output of both streams."""
    assert returncode == 2, said
    assert "Traceback" not in said
    assert "Error executing job" not in said
    assert len(said.strip().splitlines()) == 1, said
    assert not (directory / "outputs").exists()
    return said


REAL = ("peft.rnk=8", "peft.rank=big", "lr=0", "hydra.run.dir=/proc/nope")
"""An error of Hydra, of OmegaConf, of our own rules, and of the file system; the other errors run in forks."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("peft.rnk=8", "peft.rnk: unknown key; did you mean peft.rank?"),
        ("+peft.rnk=8", "peft.rnk: unknown key; did you mean peft.rank?"),
        ("foo=1", "foo: unknown key"),
        ("peft=none peft.rank=16", "peft.rank: unknown key"),
        ("peft.rank=big", "peft.rank: Value 'big' of type 'str' could not be converted to Integer"),
        ("peft=lor", "peft=lor: no such choice; did you mean peft=lora?"),
        (
            "cluster=nonsense",
            "cluster=nonsense: no such choice (choices: docker, kubernetes, local, skypilot, slurm)",
        ),
        ("cluster=_parallelism", "cluster=_parallelism: no such choice; a name with _ in front is that of a part"),
        ("-m peft=lora,_adapter", "peft=_adapter: no such choice"),
        (
            "task=continual task.stages=[{name:a,overrides:[task=pretrain,data=_chat]}]",
            "task.stages[0] (a): data=_chat: no such choice",
        ),
        ("model=hub", "model.source is not set"),
        ("task.micro_batch_size=3", "must be a multiple of task.micro_batch_size (3) x data_parallel (1) = 3"),
        ("cluster.tensor_parallel=2", "must divide the number of processes (1); set cluster.devices"),
        (
            "cluster.accelerator=cpu cluster.devices=3 cluster.tensor_parallel=3 task.micro_batch_size=4",
            "cluster.tensor_parallel (3) must divide the model's KV groups (2); this model allows 1, 2",
        ),
        ("cluster.devices=64 task.global_batch_size=512", "cluster.devices (64) is more than the"),
        ("model=local model.source=/nope", "model.source (/nope) is not a directory"),
        ("model=hub model.source=hf://only", "must read hf://ORG/NAME or hf://ORG/NAME@REVISION"),
        ("task.sequence_length=4096", "must be at most the model's max_position_embeddings (2048)"),
        ("task.sequence_length=4", "no row has loss tokens within task.sequence_length (4)"),
        ("lr=0", "lr (0.0) must be above 0"),
        ("peft.dropout=1.0", "peft.dropout (1.0) must be below 1"),
        ("peft.target_modules=[q_proj]", "must name one or more of linear_qkv"),
        ("task.max_time=90", "task.max_time (90) must read [D-]HH:MM:SS and be above 0, like 01:30:00 or 2-12:00:00"),
        ("hydra.run.dir=/proc/nope", "hydra.run.dir (/proc/nope) cannot be created"),
    ],
)
def test_config(arguments: str, message: str, tmp_path: Path) -> None:
    refused = (refuse if arguments in REAL else refuse_forked)(*arguments.split(), directory=tmp_path)
    assert message in refused


def test_a_typo_in_an_experiment_file(tmp_path: Path) -> None:
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/typo.yaml").write_text("# @package _global_\npeft:\n  rnk: 8\n")
    message = refuse_forked(f"--config-dir={tmp_path}/conf", "experiment=typo", directory=tmp_path)
    assert message.startswith("conf/experiment/typo.yaml: peft.rnk: Key 'rnk' not in 'LoraConfig'")


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (GOOD + b"{broken\n", ":2", "not JSON"),
        (GOOD + b'\n{"prompt": "a"}\n', ":3", "field 'completion' is missing (found: 'prompt')"),
        (b"", "", "is empty"),
        (GOOD + '{"prompt": "日本", "completion": "b"}\n'.encode("shift_jis"), ":2", "is not UTF-8"),
        (GOOD + b"[1]\n", ":2", "an array, it must be an object"),
        (GOOD + b'{"prompt": "a", "completion": " "}\n', ":2", "field 'completion' is empty"),
        (GOOD, "", "has one row"),
    ],
)
def test_rows(content: bytes, line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    said = refuse_forked("data=jsonl", f"data.path={path}", directory=tmp_path)
    assert f"{path}{line}" in said
    assert message in said


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json is missing"),
        ('{"model_type": "gpt2"}', "model_type (gpt2) is not supported; supported: qwen2"),
        ("{", "cannot be read as JSON"),
        ((ROOT / "qwen_cl/demo/model/config.json").read_text(), "holds no *.safetensors (found pytorch_model.bin)"),
    ],
)
def test_model_directories(config: str | None, message: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "pytorch_model.bin").write_bytes(b"")
    if config is not None:
        (model / "config.json").write_text(config)
    assert message in refuse_forked("model=local", f"model.source={model}", directory=tmp_path)


@pytest.mark.parametrize("arguments", ["peft.rnk=8", "--help", "--cfg job", "lr=0"])
def test_quick_answers_import_neither_torch_nor_nemo(arguments: str, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['launch.py', *{arguments.split()!r}]\n"
        f"try: runpy.run_path({str(ROOT / 'launch.py')!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "sys.exit(9 if {'torch', 'nemo', 'transformers'} & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_names_every_choice() -> None:
    text = read_help(ROOT / "conf")
    choices = list((ROOT / "conf").glob("*/[!_]*.yaml"))
    assert len(choices) > 20
    for path in choices:
        assert path.parent.name in text
        assert path.stem in text
