"""``task=generate``: answers compared with a loop over transformers, one prompt at a time."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_cl.config.errors import UserError
from qwen_cl.config.override_text import quote_free_text
from qwen_cl.config.overrides import quoted
from tests.conftest import ROOT, Launched, launch
from tests.support.asking import ask, check
from tests.support.exporting import run_export, seal
from tests.support.models import DEMO_MODEL

PROMPTS = ["日本の首都はどこですか。", "春", "尺八とはどのような楽器ですか。木ですか。"]
END_OF_TURN, END_OF_TEXT = 4076, 4074


def by_hand(model: Any, ids: list[int], new: int) -> list[int]:
    """Decode greedily, without a cache or a batch."""
    ids = list(ids)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-new:]


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def test_a_run_answers_as_its_export_does(trained: Launched, tmp_path: Path, tokenizer: Any) -> None:
    """Run the command in its own processes; a Japanese prompt needs no quotes for Hydra."""
    run = f"task.run={trained.folder.directory}"
    asked = ["task=generate", run, f"task.prompt={PROMPTS[0]}", "task.max_new_tokens=8"]
    done = launch(*asked, directory=tmp_path / "o", warm=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "o").exists()
    run_export(run, f"task.output={tmp_path / 'merged'}", "task.dtype=fp32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], add_generation_prompt=True, return_dict=False
    )
    expected = by_hand(model, prompt, 8)
    if END_OF_TURN in expected:
        expected = expected[: expected.index(END_OF_TURN)]
    assert done.stdout == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_a_batch_of_prompts_of_different_lengths(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = [{"role": "user", "content": "春"}, {"role": "assistant", "content": "夏"}]
    conversation.append({"role": "user", "content": "秋"})
    rows: list[dict[str, Any]] = [*({"prompt": text} for text in PROMPTS), {"messages": conversation}]
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ask("task=generate", f"task.prompts={prompts}", "task.max_new_tokens=6", f"task.output={output}")
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    found = written(output)
    for row, answer in zip(rows, found):
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        expected = by_hand(model, asked, 6)
        end = next((place for place, token in enumerate(expected) if token in (END_OF_TURN, END_OF_TEXT)), None)
        kept = expected[:end]
        assert answer == {
            **row,
            "completion": tokenizer.decode(kept),
            "tokens": len(kept),
            "ended": end is not None,
        }
    assert len({answer["ended"] for answer in found}) == 2  # a batch has both
    assert f"> {PROMPTS[1]}\n{found[1]['completion']}\n" in capsys.readouterr().out


def test_it_stops_where_the_generation_config_says(tmp_path: Path, tokenizer: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    expected = by_hand(base, tokenizer(PROMPTS[0])["input_ids"], 6)
    end = expected[3]
    directory = Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [END_OF_TEXT, end], "top_k": 1}))
    (tmp_path / "prompts.txt").write_text(PROMPTS[0] + "\n", encoding="utf-8")
    said = ["task=generate", "model=local", f"model.source={directory}", f"task.prompts={tmp_path / 'prompts.txt'}"]
    ask(*said, "task.raw=true", "task.max_new_tokens=6", f"task.output={tmp_path / 'answers.jsonl'}")
    kept = expected[: expected.index(end)]
    (answer,) = written(tmp_path / "answers.jsonl")
    assert answer["completion"] == tokenizer.decode(kept)
    assert (answer["tokens"], answer["ended"]) == (len(kept), True)


def test_an_answer_ends_where_the_chat_template_ends_it(tokenizer: Any) -> None:
    from qwen_cl.inference.generation import model_stop_tokens

    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == END_OF_TURN
    assert model_stop_tokens(model, tokenizer, raw=False) == [END_OF_TEXT, END_OF_TURN]
    assert model_stop_tokens(model, tokenizer, raw=True) == [END_OF_TEXT]


def test_what_is_drawn_is_the_seeds(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    said = ["task=generate", f"task.prompts={tmp_path / 'prompts.txt'}", "task.max_new_tokens=12"]
    for name, more in {
        "one": ["task.temperature=1", "seed=1"],
        "again": ["task.temperature=1", "seed=1"],
        "two": ["task.temperature=1", "seed=2"],
        "greedy": [],
        "cold": ["task.temperature=1", "task.top_p=0.000001"],
    }.items():
        ask(*said, *more, f"task.output={tmp_path / name}")
    one, again, two, greedy, cold = (
        (tmp_path / name).read_text() for name in ("one", "again", "two", "greedy", "cold")
    )
    assert one == again
    assert one != two
    assert cold == greedy  # only the likeliest token can be sampled


@pytest.mark.parametrize("text", ["春、夏, 秋", "it's \\' a", "a=b: {c} [d] (e)", "back\\", "\\\\'", 'say "x"', "x,y"])
def test_free_text_reaches_the_config_as_it_was_typed(text: str) -> None:
    parse = OverridesParser.create().parse_override
    assert parse(quote_free_text(f"task.prompt={text}")).value() == text
    assert parse(f"model.source={quoted(text)}").value() == text


@pytest.mark.parametrize("argument", ["task.prompt='a'", 'task.prompt="a"', "task.prompt=null", "lr=1,2", "-m"])
def test_what_is_quoted_or_no_text_stays(argument: str) -> None:
    assert quote_free_text(argument) == argument


REFUSED: dict[str, tuple[list[str], str, str]] = {
    "no prompt": ([], "", r"set either task\.prompt \(one prompt\) or task\.prompts"),
    "two": (["task.prompt=a", "task.prompts=b"], "", r"set either task\.prompt \(one prompt\) or task\.prompts"),
    "blank": (["task.prompt=' '"], "", r"task\.prompt is empty; write a prompt for the model"),
    "no file": (["task.prompts=/no/such"], "", r"/no/such does not exist; set task\.prompts"),
    "no row": (["task.prompts={file}"], "\n\n", r"prompts\.jsonl is empty"),
    "no JSON": (["task.prompts={file}"], '{"prompt": "a"}\nb\n', r"prompts\.jsonl:2: not JSON"),
    "no field": (["task.prompts={file}"], '{"text": "a"}', r"jsonl:1: field 'prompt' or 'messages' is missing \(found"),
    "answered": (
        ["task.prompts={file}"],
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        r"prompts\.jsonl:1: messages ends with an answer, which leaves nothing to answer; cut it",
    ),
    "raw conversation": (
        ["task.prompts={file}", "task.raw=true"],
        '{"messages": [{"role": "user", "content": "a"}]}',
        r"prompts\.jsonl:1: task\.raw=true continues texts, and this row is a conversation; write the field prompt",
    ),
    "too long": (
        ["task.prompt=a", "task.max_new_tokens=2048"],
        "",
        r"the prompt 'a' has \d+ tokens, which with task\.max_new_tokens \(2048\) is more than .* \(2048\)",
    ),
    "temperature": (["task.prompt=a", "task.temperature=-1"], "", r"task\.temperature \(-1\.0\) must be at least 0"),
    "top_p": (["task.prompt=a", "task.top_p=0"], "", r"task\.top_p \(0\.0\) must be above 0"),
    "new tokens": (["task.prompt=a", "task.max_new_tokens=0"], "", r"task\.max_new_tokens \(0\) must be at least 1"),
    "batch": (["task.prompt=a", "task.batch_size=0"], "", r"task\.batch_size \(0\) must be at least 1"),
    "empty run": (["task.prompt=a", "task.run=''"], "", r"task\.run is empty; name the folder of a run"),
    "empty output": (["task.prompt=a", "task.output=''"], "", r"task\.output is empty; name a file to write"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_anything_starts(name: str, tmp_path: Path) -> None:
    said, content, message = REFUSED[name]
    (tmp_path / "prompts.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        check("task=generate", *(part.format(file=tmp_path / "prompts.jsonl") for part in said))
    assert "\n" not in str(caught.value)


def test_without_a_chat_template_raw_is_proposed(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))
    (directory / "chat_template.jinja").unlink()
    said = ["task=generate", "model=local", f"model.source={directory}", "task.prompt=a"]
    with pytest.raises(UserError, match=r"has no chat template, .* or task\.raw=true continues prompts without one"):
        check(*said)
    check(*said, "task.raw=true")


def test_a_mistake_the_child_meets_reads_like_any_other(trained: Launched, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained.folder.directory, tmp_path / "run", ignore=shutil.ignore_patterns("wandb")))
    next((run / "checkpoints/step=40/weights").glob("*.distcp")).unlink()
    seal(run / "checkpoints/step=40")  # otherwise the launcher detects it
    done = launch("task=generate", f"task.run={run}", "task.prompt=a", directory=tmp_path / "o", warm=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "checkpoint is" in done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_it_and_the_child_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "launch.py", f"hydra.run.dir={tmp_path / 'o'}", "task=generate", "task.raw=true"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("春\n" * 5000, encoding="utf-8")
    more = [f"task.prompts={prompts}", "task.batch_size=1", f"task.output={tmp_path / 'answers.jsonl'}"]
    process = subprocess.Popen(
        [*command, *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "> 春\n"  # the child is running
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()  # returns when every process has closed the pipe
    assert process.returncode == 130
    assert "Traceback" not in said
    assert not (tmp_path / "answers.jsonl").exists()
