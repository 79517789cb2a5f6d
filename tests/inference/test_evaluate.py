"""``task=evaluate``: losses compared with transformers and PEFT."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_cl.config.errors import RunFailed, UserError
from tests.conftest import ROOT, Launched, launch
from tests.support.asking import ask, check
from tests.support.models import DEMO_MODEL

DATA = ROOT / "qwen_cl/demo/data"
INSTRUCTIONS, TEXTS = DATA / "instructions.validation.jsonl", DATA / "text.validation.jsonl"


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def nats(model: Any, ids: list[int], first: int) -> float:
    """Return the sum of the losses of the tokens from ``first`` on, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    chosen = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return -float(chosen[first - 1 :].sum())


@pytest.fixture(scope="module")
def told(trained: Launched, tmp_path_factory: pytest.TempPathFactory) -> tuple[Launched, dict[str, Any]]:
    """Run the command once, with sets, samples and benchmarks."""
    directory = tmp_path_factory.mktemp("evaluate")
    (directory / "prompts.txt").write_text("日本の首都はどこですか。\n\n富士山の高さは。\n", encoding="utf-8")
    done = launch(
        "task=evaluate",
        f"task.run={trained.folder.directory}",
        f"task.sets={{japanese: '{INSTRUCTIONS}', text: '{TEXTS}'}}",
        f"task.prompts={directory / 'prompts.txt'}",
        "task.max_new_tokens=4",
        f"task.output={directory / 'out/evaluation.json'}",
        directory=directory / "outputs/run",
        warm=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (directory / "outputs/run").exists()
    return done, json.loads((directory / "out/evaluation.json").read_text(encoding="utf-8"))


def test_the_validation_loss_of_the_run_is_reproduced(trained: Launched, told: tuple[Launched, Any]) -> None:
    done, record = told
    metrics = [json.loads(line) for line in trained.folder.metrics_file.read_text().splitlines()]
    last = [line for line in metrics if "val/target/loss" in line][-1]
    assert record["step"] == last["step"] == 40
    assert record["sets"]["japanese"]["loss"] == pytest.approx(last["val/target/loss"], abs=1e-4)
    assert record["sets"]["japanese"]["tokens"] == last["val/target/tokens"]
    assert f"japanese: loss {last['val/target/loss']:.4f}" in done.stdout


def test_a_set_of_instructions_is_what_peft_computes(trained: Launched, told: tuple[Launched, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    base = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(trained.folder.adapter)).eval()
    total, tokens = 0.0, 0
    for row in rows(INSTRUCTIONS):
        asked = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        answer = tokenizer(row["completion"] + "<|im_end|>")["input_ids"]
        total += nats(model, prompt + answer, len(prompt))
        tokens += len(answer)
    found = told[1]["sets"]["japanese"]
    num_bytes = sum(len(row["completion"].encode()) for row in rows(INSTRUCTIONS))
    assert (found["rows"], found["tokens"], found["num_bytes"]) == (40, tokens, num_bytes)
    assert found["loss"] == pytest.approx(total / tokens, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)


def test_samples_of_the_base_stand_beside_the_runs(told: tuple[Launched, Any]) -> None:
    done, record = told
    assert [sample["prompt"] for sample in record["samples"]] == ["日本の首都はどこですか。", "富士山の高さは。"]
    assert all(sample["before"] != sample["after"] for sample in record["samples"])
    assert "before" in done.stdout
    assert "after" in done.stdout


@pytest.fixture(scope="module")
def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()


def test_texts_are_one_stream_in_which_every_token_counts_once(
    base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluate a pretrained model in sequences of 64 tokens, on the same text as .txt and as JSON Lines."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    texts = [row["text"] for row in rows(TEXTS)]
    (tmp_path / "one.txt").write_text(texts[0] + "\n", encoding="utf-8")
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": texts[0] + "\n"}) + "\n", encoding="utf-8")
    sets = f"task.sets={{all: '{TEXTS}', txt: '{tmp_path / 'one.txt'}', jsonl: '{tmp_path / 'one.jsonl'}'}}"
    output = tmp_path / "evaluation.json"
    ask("task=evaluate", sets, "task.sequence_length=64", "task.batch_size=3", f"task.output={output}")
    found = json.loads(output.read_text())
    stream = [tokenizer.eos_token_id]
    for text in texts:
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    total = sum(nats(base, stream[start : start + 65], 1) for start in range(0, len(stream) - 1, 64))
    num_bytes = sum(len(text.encode()) for text in texts)
    assert found["run"] is None
    assert found["sets"]["all"]["tokens"] == len(stream) - 1
    assert found["sets"]["all"]["loss"] == pytest.approx(total / (len(stream) - 1), abs=1e-5)
    assert found["sets"]["all"]["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)
    for name in ("txt", "jsonl"):
        found["sets"][name].pop("sha256")
    assert found["sets"]["txt"] == found["sets"]["jsonl"]
    assert "bits per byte" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra lm_eval")
def test_the_harness_scores_a_task_of_ones_own_without_a_network(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    choices = ["東京", "大阪の町", "山"]
    docs = [{"question": row["prompt"], "target": 1} for row in rows(INSTRUCTIONS)[:6]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: '{tmp_path / 'rows.jsonl'}'}}}}\n"
        "validation_split: validation\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        f"doc_to_choice: {json.dumps(choices)}\ndoc_to_target: target\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc}]\n"
    )
    said = ["task=evaluate", f"task.lm_eval_include={tmp_path}"]
    ask(*said, "task.lm_eval=[mine]", f"task.output={tmp_path / 'out.json'}")
    right = 0
    for doc in docs:
        prompt = tokenizer(doc["question"])["input_ids"]
        scores = [-nats(base, prompt + tokenizer(choice)["input_ids"], len(prompt)) for choice in choices]
        right += scores.index(max(scores)) == doc["target"]
    found = json.loads((tmp_path / "out.json").read_text())["lm_eval"]["mine"]
    assert found["acc,none"] == pytest.approx(right / len(docs))
    with pytest.raises(UserError, match=r"task\.lm_eval: the harness has no task no_such_task, nor in "):
        ask(*said, "task.lm_eval=[no_such_task]")
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(RunFailed, match=r"lm-evaluation-harness failed: .*rows\.jsonl"):
        ask(*said, "task.lm_eval=[mine]")


def test_without_the_harness_its_tasks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else stock(name))
    with pytest.raises(UserError, match=r"task\.lm_eval needs lm-evaluation-harness, which is not installed: pip"):
        check("task=evaluate", "task.lm_eval=[mine]")


SHIFT_JIS = "日本\n".encode("shift_jis")
REFUSED: dict[str, tuple[list[str], bytes, str]] = {
    "nothing": ([], b"", r"task=evaluate has nothing to evaluate; set task\.sets, for example"),
    "unsafe name": (["task.sets={a b: '{file}.jsonl'}"], b"", r"task\.sets: 'a b' must be letters"),
    "absent": (["task.sets={a: /no/such.jsonl}"], b"", r"task\.sets\.a \(/no/such\.jsonl\) does not exist; name a"),
    "absent text": (["task.sets={a: /no/such.txt}"], b"", r"task\.sets\.a \(/no/such\.txt\) does not exist; name a"),
    "unknown format": (["task.sets={a: '{file}.xyz'}"], b"x", r"task\.sets\.a: .*\.xyz is of an unknown format; known"),
    "empty": (["task.sets={a: '{file}.jsonl'}"], b" \n", r"file\.jsonl is empty; it must hold rows, or a text"),
    "empty text": (["task.sets={a: '{file}.txt'}"], b"\n", r"file\.txt: the text is empty; remove the row or"),
    "broken line": (["task.sets={a: '{file}.jsonl'}"], b'{"text": "a"}\n{"te\n', r"file\.jsonl:2: not JSON"),
    "not UTF-8": (["task.sets={a: '{file}.txt'}"], b"ok\n" + SHIFT_JIS, r"file\.txt:2: byte 0x93 at column 1 is not"),
    "two kinds": (
        ["task.sets={a: '{file}.jsonl'}"],
        b'{"text": "a"}\n{"prompt": "a", "completion": "b"}\n',
        r"file\.jsonl:2: field 'text' is missing \(found: 'prompt', 'completion'\)",
    ),
    "no answer fits": (
        ["task.sets={a: '{file}.jsonl'}", "task.sequence_length=2"],
        b'{"prompt": "a", "completion": "b"}\n',
        r"no row has loss tokens within task\.sequence_length \(2\)",
    ),
    "too long": (
        ["task.sets={a: '{file}.jsonl'}", "task.sequence_length=4096"],
        b'{"text": "a"}\n',
        r"task\.sequence_length \(4096\) must be at most the model's longest sequence \(2048\)",
    ),
    "output exists": (
        ["task.sets={a: '{file}.jsonl'}", "task.output={file}.jsonl"],
        b'{"text": "a"}\n',
        r"task\.output \(.*file\.jsonl\) exists; choose another file",
    ),
    "ignored": (["task.sets={a: x.jsonl}", "lr=0.1"], b"", r"lr=0\.1 has no effect: nothing is trained"),
    "a model and a run": (
        ["task.sets={a: x.jsonl}", "task.run=/no", "model=qwen2.5-7b"],
        b"",
        r"model=qwen2\.5-7b has no effect: with task\.run the model is the one of the run",
    ),
    "no run": (
        ["task.sets={a: '{file}.jsonl'}", "task.run=/no"],
        b'{"text": "a"}\n',
        r"task\.run \(/no\) is not the folder of a run",
    ),
    "a step of nothing": (["task.sets={a: x.jsonl}", "task.step=3"], b"", r"task\.step \(3\) is a checkpoint of a run"),
    "files of no task": (
        ["task.sets={a: x.jsonl}", "task.lm_eval_include=/tmp"],
        b"",
        r"task\.lm_eval_include has task files, and task\.lm_eval names none",
    ),
    "no such files": (
        ["task.lm_eval=[x]", "task.lm_eval_include=/no/such"],
        b"",
        r"task\.lm_eval(_include \(/no/such\) must be a directory| needs lm-evaluation-harness)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_anything_starts(name: str, tmp_path: Path) -> None:
    said, content, message = REFUSED[name]
    for suffix in ("jsonl", "txt", "xyz"):
        (tmp_path / f"file.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        check("task=evaluate", *(part.replace("{file}", str(tmp_path / "file")) for part in said))
    assert "\n" not in str(caught.value)
