"""NeMo's stock recipes from ``hf://``, without the launcher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import ROOT
from tests.support.hub import Hub, client_environment
from tests.support.models import save_random_model

RUNS = str(ROOT / "tests/support/stock_recipe_runs.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with an odd vocabulary size and tied embeddings, as Qwen2.5-0.5B has."""
    return save_random_model(tmp_path_factory.mktemp("model") / "model", vocab_size=1537)


def run(model: Path, directory: Path, *names: str, processes: int = 1) -> str:
    """Run the recipes with a Hub that is up only while the process runs; return the commit it served."""
    data = directory / "data"
    data.mkdir()
    for part in ("training", "validation"):
        rows = [{"input": f"{part} {number}:", "output": f"{number * number}"} for number in range(40)]
        (data / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with Hub(directory / "hub") as hub:
        commit = hub.publish("Qwen/Qwen2.5-0.5B", model, "main")
        done = subprocess.run(
            [sys.executable, *(torchrun if processes > 1 else []), RUNS, str(directory), *names],
            env=client_environment(
                hub.url,
                directory / "home",
                PYTHONPATH=str(ROOT),
                NEMORUN_HOME=str(directory / "nemo_run"),
                CUDA_VISIBLE_DEVICES="",
                OMP_NUM_THREADS="1",
            ),
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return commit


def first_losses(model: Path, directory: Path) -> tuple[float, float]:
    """Return the losses of the first step: the run's, and transformers' on the same batch."""
    batch = load_file(directory / "batch.safetensors")
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = reference(batch["tokens"]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"].long(), reduction="none")
    trained: list[float] = json.loads((directory / "losses.json").read_text())
    assert len(trained) == 2
    return trained[0], float((losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum())


def recorded_sources(directory: Path) -> list[str]:
    return [json.loads(path.read_text())["source"] for path in directory.glob("log/**/weights/base_model.json")]


@pytest.mark.slow
def test_the_readme_code_trains_in_the_process_nemo_run_starts(model: Path, tmp_path: Path) -> None:
    commit = run(model, tmp_path, "readme")
    trained, reference = first_losses(model, tmp_path / "readme")
    assert trained == pytest.approx(reference, abs=1e-4)
    assert recorded_sources(tmp_path / "readme") == [f"hf://Qwen/Qwen2.5-0.5B@{commit}"]
    context = next(tmp_path.glob("readme/log/**/context"))
    assert list(context.rglob("tokenizer.json"))
    assert not list(context.rglob("*.safetensors")), "NeMo copies the directory of the tokenizer into every checkpoint"


@pytest.mark.slow
def test_upstream_fails_and_with_the_line_every_kind_of_recipe_trains(model: Path, tmp_path: Path) -> None:
    commit = run(model, tmp_path, "upstream", "full", "pretrain", "plain")
    assert json.loads((tmp_path / "upstream/error.json").read_text()) == [
        "AssertionError",
        "Only NeMo based paths starting with nemo:// are currently supported.",
    ]
    source = f"hf://Qwen/Qwen2.5-0.5B@{commit}"
    for name in ("full", "pretrain", "plain"):
        trained, reference = first_losses(model, tmp_path / name)
        assert trained == pytest.approx(reference, abs=1e-4), name
        assert source in recorded_sources(tmp_path / name)
    assert json.loads((tmp_path / "plain/error.json").read_text()) == [
        "UserError",
        f"model.config.num_layers (3) is not that of {source} (2); use the recipe of that model, "
        "or set model.config.num_layers=2",
    ]


@pytest.mark.slow
def test_ranks_under_torchrun_share_one_empty_cache(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path, "tensor_parallel", processes=2)
    trained, reference = first_losses(model, tmp_path / "tensor_parallel")
    assert trained == pytest.approx(reference, abs=1e-4)


def test_the_line_fills_what_is_unset_and_refuses_another_model(model: Path) -> None:
    """Check everything in one test, as importing NeMo takes long."""
    import nemo_run
    from nemo.collections import llm

    from qwen_cl import from_hugging_face
    from qwen_cl.config.errors import UserError

    def recipe(**fields: Any) -> Any:
        stock = llm.qwen25_500m.finetune_recipe(num_nodes=1, num_gpus_per_node=1, peft_scheme="lora")
        shape = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}
        for name, value in {**shape, "vocab_size": 1537, **fields}.items():
            setattr(stock.model.config, name, value)
        stock.data.seq_length = 64
        return stock

    given = recipe()
    given.resume.resume_if_exists = True
    untouched = str(given)
    ours = from_hugging_face(given, str(model))
    assert str(given) == untouched
    assert ours.resume.resume_if_exists
    assert ours.resume.restore_config.path == str(model)
    assert ours.model.tokenizer.source == ours.data.tokenizer.source == str(model)
    assert ours.model.config.share_embeddings_and_output_weights, "the checkpoint is tied"
    assert not from_hugging_face(
        recipe(share_embeddings_and_output_weights=False), str(model)
    ).model.config.share_embeddings_and_output_weights

    given.model.tokenizer = nemo_run.Config(llm.Qwen2Config)  # any value; it must not change
    assert from_hugging_face(given, str(model)).model.tokenizer == given.model.tokenizer

    other = "use the recipe of that model, or set recipe.model.config"
    for fields, message in (
        ({"num_layers": 28}, f"num_layers (28) is not that of {model} (2); {other}.num_layers=2"),
        ({"num_query_groups": 4}, f"num_query_groups (4) is not that of {model} (2); {other}.num_query_groups=2"),
        ({"kv_channels": 32}, f"kv_channels (32) is not that of {model} (16); {other}.kv_channels=16"),
        (
            {"rotary_base": 1e4},
            f"rotary_base (10000.0) is not that of {model} (1000000.0); {other}.rotary_base=1000000.0",
        ),
        ({"add_qkv_bias": False}, f"add_qkv_bias (False) is not that of {model} (True); {other}.add_qkv_bias=True"),
        (
            {"vocab_size": 1536},
            f"vocab_size (1536) is less than that of {model} (1537); set recipe.model.config.vocab_size=1537, or more "
            "for padding",
        ),
    ):
        with pytest.raises(UserError) as refused:
            from_hugging_face(recipe(**fields), str(model))
        assert str(refused.value) == f"recipe.model.config.{message}"

    too_long = recipe()
    too_long.data.seq_length = 513
    with pytest.raises(UserError, match=r"recipe\.data\.seq_length \(513\) must be at most the longest sequence of"):
        from_hugging_face(too_long, str(model))
    with pytest.raises(UserError, match=r"recipe\.model has no config"):
        from_hugging_face(nemo_run.Partial(llm.finetune), str(model))
    untied = save_random_model(model.parent / "untied", vocab_size=1537, tied=False)
    with pytest.raises(UserError, match=r"share_embeddings_and_output_weights \(True\) would lose the lm_head of"):
        from_hugging_face(recipe(share_embeddings_and_output_weights=True), str(untied))
    assert not from_hugging_face(recipe(), str(untied)).model.config.share_embeddings_and_output_weights


def test_the_package_itself_imports_nothing_heavy() -> None:
    code = "import qwen_cl, sys; print(sorted({'torch', 'nemo', 'lightning', 'nemo_run'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
