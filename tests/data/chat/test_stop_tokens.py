"""Answers end at the same tokens in training, generation, and exports for transformers and PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qwen_cl.data.chat.stop_tokens import end_of_turn_tokens, has_stop_token, stop_tokens, trains_on_conversations
from qwen_cl.models.generation_config import write_generation_config
from tests.conftest import Launched, launch, launch_once
from tests.support.asking import ask
from tests.support.exporting import composed, run_export
from tests.support.models import DEMO_MODEL

END_OF_TEXT, END_OF_TURN, TOOL_END = 4074, 4076, 4078
TURNS = "{% for message in messages %}"
PLAIN = TURNS + "### {{ message.role }}:\n{{ message.content }}\n{% endfor %}"
TEMPLATES = {
    "a token": (TURNS + "<|im_start|>{{ message.content }}<|im_end|>\n{% endfor %}", [END_OF_TURN]),
    "a blank and the tokenizer's own": (TURNS + "{{ message.content }} {{ eos_token }}{% endfor %}", [END_OF_TEXT]),
    "two tokens": (TURNS + "{{ message.content }}<|im_end|><|endoftext|>{% endfor %}", [END_OF_TURN]),
    "words and a token": (TURNS + "{{ message.content }}\n### End<|im_end|>{% endfor %}", [END_OF_TURN]),
    "not the last": (
        TURNS + "{{ message.content }}{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}",
        [END_OF_TURN],
    ),
    "a tool call with another": (
        TURNS + "{% if message.tool_calls %}{{ message.tool_calls[0].function.name }}()<|object_ref_end|>"
        "{% else %}{{ message.content }}<|im_end|>{% endif %}{% endfor %}",
        [END_OF_TURN, TOOL_END],
    ),
    "no tools": (
        TURNS + "{% if message.tool_calls %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ message.content }}<|im_end|>{% endfor %}",
        [END_OF_TURN],
    ),
    "nothing": (PLAIN, []),
    "the start of the next turn": (TURNS + "<|im_start|>{{ message.content }}\n{% endfor %}", []),
    "text": (TURNS + "{{ message.content }}</s>{% endfor %}", []),
    "no template": (None, []),
}
WITHOUT_A_LAST_END = ("nothing", "text", "not the last", "the start of the next turn", "no template")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.mark.parametrize("case", TEMPLATES)
def test_how_a_template_ends_answers(case: str, tokenizer: Any) -> None:
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template, ends = TEMPLATES[case]
        assert end_of_turn_tokens(tokenizer) == ends
        assert has_stop_token(tokenizer) == (case not in WITHOUT_A_LAST_END)
        assert stop_tokens(tokenizer, [7], raw=False) == sorted({7, END_OF_TEXT, *ends})
        assert stop_tokens(tokenizer, [7], raw=True) == [7, END_OF_TEXT]
    finally:
        tokenizer.chat_template = own


def test_only_conversations_teach_where_answers_end() -> None:
    assert trains_on_conversations(composed("task=finetune"))
    assert trains_on_conversations(composed("task=finetune", "task.loss_on=all"))
    assert not trains_on_conversations(composed("task=pretrain"))
    assert not trains_on_conversations(composed("task=finetune", "data=mock"))


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"eos_token_id": 5, "top_k": 3}, {"eos_token_id": [5, 9], "top_k": 3}),
        ({"eos_token_id": [6, 5], "_from_model_config": True}, {"eos_token_id": [6, 5, 9]}),
        ({"eos_token_id": [9, 5], "_from_model_config": True}, {"eos_token_id": [9, 5], "_from_model_config": True}),
        ({"temperature": 0.5, "do_sample": True}, {"temperature": 0.5, "do_sample": True, "eos_token_id": 9}),
        (None, {"bos_token_id": 1, "eos_token_id": [2, 9]}),
    ],
)
def test_the_bases_own_settings_stay(given: Any, written: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}))
    if given is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(given))
    (tmp_path / "export").mkdir()
    write_generation_config(tmp_path / "export", tmp_path, [9])
    assert json.loads((tmp_path / "export/generation_config.json").read_text()) == written


def test_without_ends_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    write_generation_config(tmp_path, tmp_path, [])
    assert not (tmp_path / "generation_config.json").exists()


@pytest.fixture(scope="module")
def brief(shared_directory: Path) -> Launched:
    """A run that has learnt to answer with a word, and to stop."""
    rows = shared_directory / "brief.jsonl"
    lines = [json.dumps({"prompt": f"Is {number} a number?", "completion": "はい。"}) for number in range(40)]
    rows.write_text("\n".join(lines), encoding="utf-8")
    short = ["task.max_steps=40", "task.warmup_steps=5", "task.sequence_length=64", "task.sample_prompts=0", "lr=0.003"]
    none = ["retention=none", "wandb.mode=disabled", "model.verify=none", "cluster.accelerator=cpu"]
    done = launch_once(shared_directory, "brief", "peft=none", "data=jsonl", f"data.path={rows}", *short, *none)
    assert done.returncode == 0, done.stderr
    return done


def test_an_export_stops_where_generate_does(brief: Launched, tmp_path: Path) -> None:
    """Generate with the usual code of transformers, and the tokenizer and settings of the export."""
    run = brief.folder.directory
    prompts = ["Is 3 a number?", "Is 77 a number?"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    ask("task=generate", f"task.run={run}", f"task.prompts={tmp_path / 'prompts.txt'}", f"task.output={tmp_path / 'a'}")
    expected = [json.loads(line) for line in (tmp_path / "a").read_text(encoding="utf-8").splitlines()]
    assert [answer["completion"] for answer in expected] == ["はい。", "はい。"]
    assert all(answer["ended"] for answer in expected)
    run_export(f"task.run={run}", f"task.output={tmp_path / 'model'}", "task.dtype=fp32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.generation_config.eos_token_id == [END_OF_TEXT, END_OF_TURN]
    assert [_usual(model, tmp_path / "model", prompt) for prompt in prompts] == [
        (answer["completion"], answer["ended"]) for answer in expected
    ]


def test_an_adapter_has_the_stops_beside_it(trained: Launched, tmp_path: Path) -> None:
    """The one that the run wrote, and one that is exported; as they are read by transformers."""
    said = [f"task.run={trained.folder.directory}", "task.format=adapter"]
    run_export(*said, f"task.output={tmp_path / 'adapter'}")
    for adapter in (tmp_path / "adapter", trained.folder.adapter):
        assert GenerationConfig.from_pretrained(adapter).eos_token_id == [END_OF_TEXT, END_OF_TURN]


def _usual(model: Any, directory: Path, prompt: str) -> tuple[str, bool]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    produced = model.generate(**inputs, max_new_tokens=256, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    ended = produced[-1] in (END_OF_TEXT, END_OF_TURN)
    return tokenizer.decode(produced, skip_special_tokens=True), ended


@pytest.mark.parametrize("names", [None, ["input_ids", "token_type_ids", "attention_mask"]])
def test_a_tokenizer_that_gives_more_than_the_model_takes(
    names: list[str] | None, brief: Launched, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(brief.folder.directory, tmp_path / "run"))
    path = run / "model_files/tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_input_names"]
    path.write_text(json.dumps(config if names is None else {**config, "model_input_names": names}))
    run_export(f"task.run={run}")
    exported = run / "export-merged"
    inputs = AutoTokenizer.from_pretrained(exported)("Hello", return_tensors="pt")
    assert AutoModelForCausalLM.from_pretrained(exported).generate(**inputs, max_new_tokens=2).shape[0] == 1
    written = json.loads((exported / "tokenizer_config.json").read_text())
    assert written == {**config, "model_input_names": ["input_ids", "attention_mask"]}


@pytest.mark.slow
def test_a_template_that_teaches_no_end_is_named_before_training(tmp_path: Path) -> None:
    model = Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(PLAIN, encoding="utf-8")
    said = ["model=local", f"model.source={model}", "dry_run=true", "wandb.mode=disabled", "retention=none"]
    done = launch(*said, directory=tmp_path / "run")
    assert done.returncode == 0, done.stderr
    warning = f"warning: {model}: its chat template ends an answer with no special token, so the model does not learn"
    assert done.stderr.count(warning) == 1
    assert "set data.chat_template" in done.stderr
