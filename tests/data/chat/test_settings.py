"""Chat settings of the config apply wherever the model is trained, evaluated and prompted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qwen_cl.config.errors import UserError
from qwen_cl.config.saved import load_config
from qwen_cl.data.chat.conversations import parse_prompt
from qwen_cl.data.chat.encode import render_prompt
from qwen_cl.data.chat.settings import BUILT_IN, ChatSettings, chat_settings, previous_template_date
from qwen_cl.inference.target_model import find_target_model
from qwen_cl.planning.plan import make_plan
from tests.conftest import ROOT, Launched, launch, launch_once
from tests.support.asking import ask, check
from tests.support.chat_tokenizers import TEMPLATES, tokenizer_of
from tests.support.exporting import composed

DEMO_MODEL = ROOT / "qwen_cl/demo/model"
DAY = "2024-02-29"
SYSTEM = "Answer in one word."
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\\n' }}" + TEMPLATES["chatml"]
ROWS = [
    {"prompt": f"What is {number} and {number + 1}?", "completion": f"{2 * number + 1} <|im_end|>", "id": number}
    for number in range(40)
]
RUN = ["task.max_steps=2", "task.warmup_steps=0", "task.sample_prompts=1", "model.verify=none", "wandb.mode=disabled"]


@pytest.fixture(scope="session")
def dated(shared_directory: Path) -> tuple[Launched, Path]:
    """A run with a template of its own, a day and a system prompt; and its data."""
    directory = shared_directory / "dated-data"
    if not (directory / "dated.jinja").exists():
        directory.mkdir(exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in ROWS]
        (directory / "train.jsonl").write_text("".join(lines[:30]), encoding="utf-8")
        (directory / "validation.jsonl").write_text("".join(lines[30:]), encoding="utf-8")
        (directory / "dated.jinja").write_text(DATED, encoding="utf-8")
    return launch_once(shared_directory, "dated", *said(directory), f"data.template_date={DAY}", warm=True), directory


def said(directory: Path) -> list[str]:
    return [
        *(
            *RUN,
            "data=jsonl",
            f"data.path={directory}/train.jsonl",
            f"data.validation_path={directory}/validation.jsonl",
        ),
        *(f"data.chat_template={directory}/dated.jinja", f"data.system_prompt={SYSTEM}", "data.allow_overlap=true"),
        *("retention=none", "cluster.accelerator=cpu", "cluster.precision=fp32"),
    ]


def test_a_run_keeps_how_it_rendered(dated: tuple[Launched, Path]) -> None:
    run, _ = dated
    assert run.returncode == 0, run.stderr
    report = json.loads(run.folder.data_report_json.read_text(encoding="utf-8"))
    start = f"[[Today is 29 Feb 2024.\n<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nWhat is 0 and 1?"
    assert report["rendered"][0].startswith(start)
    assert report["unused_fields"] == {"the training set": {"id": 30}, "the validation set": {"id": 10}}
    assert "unused fields: in the training set id (30 rows)" in run.stdout
    assert (run.folder.tokenizer / "chat_template.jinja").read_text(encoding="utf-8") == DATED
    sample = json.loads(run.folder.samples.read_text(encoding="utf-8").splitlines()[0])
    assert sample["prompt"].startswith(f"Today is 29 Feb 2024.\n<|im_start|>system\n{SYSTEM}<|im_end|>\n")
    tokenizer = AutoTokenizer.from_pretrained(run.folder.tokenizer)
    assert tokenizer.chat_template == DATED


def test_who_asks_the_run_later_renders_likewise(dated: tuple[Launched, Path], tmp_path: Path) -> None:
    run, directory = dated
    output = tmp_path / "out.json"
    sets = f"task.sets={{held: {directory}/validation.jsonl}}"
    ask("task=evaluate", f"task.run={run.folder.directory}", sets, f"task.output={output}")
    loss = json.loads(output.read_text(encoding="utf-8"))["sets"]["held"]["loss"]
    last = [json.loads(line) for line in run.folder.metrics_file.read_text(encoding="utf-8").splitlines()][-1]
    assert loss == pytest.approx(last["val/target/loss"], abs=1e-4)
    config = composed("task=generate", f"task.run={run.folder.directory}", "task.prompt=a")
    subject = find_target_model(config, config.task)  # type: ignore[arg-type]
    asked = subject.tokenizer().decode(render_prompt(parse_prompt({"prompt": "a"}, ""), subject.tokenizer()))
    assert asked.startswith(f"Today is 29 Feb 2024.\n<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\na")


def test_it_resumes_with_its_day_and_refuses_another(dated: tuple[Launched, Path], tmp_path: Path) -> None:
    run, directory = dated
    assert previous_template_date([run.folder.config]) == DAY
    copy = Path(shutil.copytree(run.folder.directory, tmp_path / "run"))
    more = ["task.max_steps=3", "resume.allow_changes=[task.max_steps,task.lr_schedule]"]
    resumed = launch(*said(directory), *more, directory=copy, warm=True)
    assert resumed.returncode == 0, resumed.stderr
    assert load_config(copy / "config.yaml").data.template_date == DAY  # type: ignore[attr-defined]
    refused = launch(
        *said(directory),
        "task.max_steps=4",
        "resume.allow_changes=[task.max_steps]",
        "data.template_date=2024-03-01",
        directory=copy,
    )
    assert refused.returncode == 2
    assert "data.template_date was 2024-02-29 and is 2024-03-01" in refused.stderr


def test_an_export_has_the_template(dated: tuple[Launched, Path], tmp_path: Path) -> None:
    run, _ = dated
    for kind in ("merged", "adapter"):
        output = tmp_path / kind
        where = [f"task.run={run.folder.directory}", f"task.output={output}", f"task.format={kind}"]
        done = launch("task=export", *where, directory=tmp_path / "o")
        assert done.returncode == 0, done.stderr
        assert (output / "chat_template.jinja").read_text(encoding="utf-8") == DATED


@pytest.mark.slow
def test_the_datas_hash_is_of_what_was_rendered(tmp_path: Path) -> None:
    (tmp_path / "dated.jinja").write_text(DATED, encoding="utf-8")
    template = f"data.chat_template={tmp_path}/dated.jinja"

    def hashed(*more: str, run_date: str | None = None) -> str | None:
        return make_plan(composed("cluster.accelerator=cpu", "retention=none", *more), run_date=run_date).data_hash

    plain = hashed()
    files = [ROOT / f"qwen_cl/demo/data/instructions.{part}.jsonl" for part in ("train", "validation")]
    import hashlib

    assert plain == hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()  # as ever
    found = [
        plain,
        hashed("data.system_prompt=a"),
        hashed("data.special_tokens_in_content=true"),
        hashed("data.chat_template=chatml"),
        hashed(template, "data.template_date=2024-02-29"),
        hashed(template, run_date="2024-03-01"),
    ]
    assert len(set(found)) == len(found)
    assert hashed(template, run_date="2024-02-29") == found[4]
    before = found[4]
    (tmp_path / "dated.jinja").write_text(DATED + " ", encoding="utf-8")
    assert hashed(template, run_date="2024-02-29") != before


def test_built_in_templates_render_as_models_do() -> None:
    """Compare with the templates of the models they are named after, from the Hub."""
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    known = {"chatml": "chatml", "llama2": "llama2", "gemma": "gemma"}
    for path in BUILT_IN.glob("*.jinja"):
        settings = chat_settings(composed(f"data.chat_template={path.stem}").data)
        tokenizer = tokenizer_of(settings.chat_template)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
        assert text.startswith(prompt)
        system: Any = [{"role": "system", "content": "s"}, *messages]
        assert "s" in tokenizer.apply_chat_template(system, tokenize=False)
        if path.stem in known:
            theirs = tokenizer_of(TEMPLATES[known[path.stem]])
            assert text == theirs.apply_chat_template(messages, tokenize=False)


REFUSED = {
    "no such": (["data.chat_template=no-such"], r"data\.chat_template \(no-such\) cannot be read: .*alpaca, chatml"),
    "syntax": (["data.chat_template={bad}"], r"data\.chat_template \(.*bad\.jinja\), line 2: "),
    "empty": (["data.chat_template={empty}"], r"data\.chat_template \(.*\) is empty"),
    "blank": (["data.system_prompt=' '"], r"data\.system_prompt is empty; write null"),
    "no date": (["data.template_date=yesterday"], r"data\.template_date \(yesterday\) must be a date like 2024-07-26"),
    "unused date": (["data.template_date=2024-07-26"], r"data\.template_date \(2024-07-26\) has no effect"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("{{ 1 }}\n{% for %}", encoding="utf-8")
    (tmp_path / "empty.jinja").write_text("\n", encoding="utf-8")
    overrides, message = REFUSED[name]
    places = {part: str(tmp_path / f"{part}.jinja") for part in ("bad", "empty")}
    with pytest.raises(UserError, match=message):
        make_plan(composed("cluster.accelerator=cpu", *(text.format(**places) for text in overrides)))


def test_a_base_without_a_template_is_asked_with_one_that_is_named(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))
    (directory / "chat_template.jinja").unlink()
    asked = ["task=generate", "model=local", f"model.source={directory}", "task.prompt=a"]
    with pytest.raises(UserError, match=r"has no chat template, .*set data\.chat_template"):
        check(*asked)
    check(*asked, "data.chat_template=chatml", f"data.system_prompt={SYSTEM}")
    config = composed(*asked, "data.chat_template=chatml")
    subject = find_target_model(config, config.task)  # type: ignore[arg-type]
    ids = render_prompt(parse_prompt({"prompt": "a"}, ""), subject.tokenizer())
    expected = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert ids == AutoTokenizer.from_pretrained(DEMO_MODEL)(expected, add_special_tokens=False)["input_ids"]
    with pytest.raises(UserError, match=r"data\.system_prompt=.* with task\.run the model is the one of the run"):
        check("task=generate", f"task.run={tmp_path}", "task.prompt=a", "data.system_prompt=b")


def test_the_defaults_say_nothing() -> None:
    assert ChatSettings().non_defaults() == {}
    assert chat_settings(composed().data) == ChatSettings()
