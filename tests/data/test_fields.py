"""Rows whose fields have other names: those that the config gives, and the usual ones by themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from qwen_cl.config.data import FileDataConfig, TextDataConfig
from qwen_cl.config.errors import UserError
from qwen_cl.config.saved import load_config, save_config
from qwen_cl.data.chat.conversations import Conversation, pair
from qwen_cl.data.eval_sets import read_sets
from qwen_cl.data.rows import RowFiles, Text, read_rows, row_files
from qwen_cl.inference.prompts import read_prompts
from tests.conftest import launch
from tests.support.composed_configs import compose_run

CHAT = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


def read(path: Path, fields: dict[str, str] | None = None, *, raw_text: bool = False) -> list[Any]:
    source = RowFiles(train=str(path), validation=str(path), validation_every=2, raw_text=raw_text, fields=fields or {})
    return list(read_rows(source)[0])


def write(directory: Path, *rows: dict[str, Any]) -> Path:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "A", "response": "B"}, "A"),
        ({"question": "A", "answer": "B", "id": 1}, "A"),
        ({"question": "A", "response": "B"}, "A"),
        ({"query": "A", "response": "B"}, "A"),
        ({"user": "A", "assistant": "B"}, "A"),
        ({"input": "A", "output": "B"}, "A"),
        ({"instruction": "A", "response": "B", "category": "qa"}, "A"),
        ({"instruction": "A", "input": "C", "response": "B"}, "A\n\nC"),
        ({"instruction": "A", "context": "C", "response": "B"}, "A\n\nC"),
        ({"instruction": "A", "context": "", "response": "B"}, "A"),
        ({"instruction": "A", "input": "", "output": "B"}, "A"),
    ],
)
def test_usual_names_are_read_by_themselves(row: dict[str, Any], asked: str, tmp_path: Path) -> None:
    assert read(write(tmp_path, row)) == [pair(asked, "B")]


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"q": "A", "a": "B"}, {"prompt": "q", "completion": "a"}, pair("A", "B")),
        ({"q": "A", "completion": "B"}, {"prompt": "q"}, pair("A", "B")),
        ({"prompt": "B", "completion": "A"}, {"prompt": "completion", "completion": "prompt"}, pair("A", "B")),
        ({"task": "A", "given": "C", "a": "B"}, {"instruction": "task", "input": "given", "output": "a"}, "A\n\nC"),
        ({"question": "A", "context": "C", "answer": "B"}, {"prompt": "question", "completion": "answer"}, "A"),
        ({"dialog": CHAT, "prompt": "p"}, {"messages": "dialog"}, pair("x", "y")),
        ({"prompt": "p", "completion": "c", "messages": CHAT}, {"messages": "messages"}, pair("x", "y")),
        ({"prompt": "p", "completion": "c", "messages": CHAT}, {"prompt": "prompt"}, pair("p", "c")),
        ({"質問": "A", "回答": "B"}, {"prompt": "質問", "completion": "回答"}, pair("A", "B")),
    ],
)
def test_fields_are_read_under_the_names_they_are_given(
    row: dict[str, Any], fields: dict[str, str], expected: Conversation | str, tmp_path: Path
) -> None:
    wanted = pair(expected, "B") if isinstance(expected, str) else expected
    assert read(write(tmp_path, row), fields) == [wanted]


def test_a_table_may_have_columns_of_several_forms_where_each_row_fills_one(tmp_path: Path) -> None:
    rows = [
        {"prompt": "A", "completion": "B", "messages": None},
        {"prompt": None, "completion": None, "messages": CHAT},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [pair("A", "B"), pair("x", "y")]
    quoted = json.dumps(CHAT).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'prompt,completion,messages\nA,B,\n,,"{quoted}"\n', encoding="utf-8")
    assert read(tmp_path / "a.csv") == [pair("A", "B"), pair("x", "y")]


def test_what_arrow_fills_with_nulls_is_not_there(tmp_path: Path) -> None:
    """A list of objects has every key that any of its objects has."""
    first = [{**CHAT[0]}, {**CHAT[1], "weight": 1}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": first}, {"messages": CHAT}]), tmp_path / "a.parquet")
    stored = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert stored[1]["messages"][0]["weight"] is None
    assert [row.messages for row in read(tmp_path / "a.parquet")] == [pair("x", "y").messages] * 2


def test_text_is_read_under_its_name(tmp_path: Path) -> None:
    assert read(write(tmp_path, {"body": "x"}), {"text": "body"}, raw_text=True) == [Text("x")]


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (
            {"q": "A", "b": "B"},
            {"prompt": "q", "completion": "a"},
            "field 'a' is missing (found: 'q', 'b'); data.fields.completion names it: correct that",
        ),
        ({"q": "A"}, {"prompt": "q"}, "field 'completion' is missing (found: 'q'); set data.fields.completion to what"),
        ({"q": "A", "a": " "}, {"prompt": "q", "completion": "a"}, "field 'a' is empty; remove the row or fill it"),
        ({"question": "A", "answer": None}, {"prompt": "question", "completion": "answer"}, "field 'answer' is "),
        (
            {"q": "A", "a": "B", "prompt": "x"},
            {"prompt": "q", "completion": "a"},
            "field 'q' is read as prompt, and the row has a field 'prompt' too; remove or rename one of them",
        ),
        (
            {"question": "A", "answer": "B", "response": "C"},
            {},
            "the row has 'question' and 'answer', and 'question' and 'response' too; say which to read, like "
            "data.fields={prompt: question, completion: answer}",
        ),
        ({"prompt": "A", "completion": "B", "messages": CHAT}, {}, "the row has 'messages', and 'prompt' and 'complet"),
        ({"question": "A", "answer": "B", "prompt": "C"}, {}, "field 'question' is read as prompt, and the row has a"),
        (
            {"question": "A", "answer": "B", "context": "C"},
            {},
            "the row has field 'context' beside 'question' and 'answer'; read it with data.fields={instruction: "
            "question, output: answer, input: context}, or leave it out with data.fields={prompt: question, "
            "completion: answer}",
        ),
        ({"messages": "[oops"}, {}, "field 'messages' must hold a list of messages: not JSON (Expecting value at col"),
    ],
)
def test_what_may_mean_two_things_is_refused_by_line(
    row: dict[str, Any], fields: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, row)
    with pytest.raises(UserError) as refused:
        read(path, fields)
    assert str(refused.value).startswith(f"{path}:1: {message}")


def test_a_name_that_no_row_has_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "A", "completion": "B"}, {"prompt": "C", "completion": "D"})
    with pytest.raises(UserError, match=r"rows\.jsonl: no row has the field 'persona', which data\.fields\.system nam"):
        read(path, {"system": "persona"})


def config(**values: Any) -> FileDataConfig:
    composed = compose_run("data=jsonl", "data.path=x").data
    assert isinstance(composed, FileDataConfig)
    return replace(composed, **values)


def test_the_older_keys_say_the_same() -> None:
    older = config(prompt_field="q", completion_field="a", text_field="body")
    assert older.columns == {"prompt": "q", "completion": "a", "text": "body"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fields": {"promt": "q"}}, "data.fields.promt: unknown key; did you mean data.fields.prompt?"),
        ({"fields": {"prompt": " "}}, "data.fields.prompt is empty; write the name that the field has in the rows"),
        ({"fields": {"prompt": "q", "completion": "q"}}, "data.fields names the field 'q' for prompt and completion"),
        ({"fields": {"prompt": "q", "messages": "m"}}, "data.fields names prompt and messages, which are two forms"),
        (
            {"fields": {"prompt": "q"}, "prompt_field": "p"},
            "data.fields.prompt (q) and data.prompt_field (p), its old name, disagree; remove one",
        ),
    ],
)
def test_fields_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        config(**values)
    assert str(refused.value).startswith(message)


def test_fields_are_those_of_the_task(tmp_path: Path) -> None:
    path = write(tmp_path, {"q": "A", "a": "B"})
    said = compose_run("data=jsonl", f"data.path={path}", "data.fields={prompt: q, completion: a}")
    source = row_files(said.data, said.task)
    assert source is not None
    assert source.fields == {"prompt": "q", "completion": "a"}
    pretrain = compose_run("task=pretrain")
    with pytest.raises(
        UserError, match=r"^data\.fields\.prompt is a field of conversations, which task=pretrain does not read"
    ):
        row_files(said.data, pretrain.task)


def test_raw_text_has_the_one_field() -> None:
    said = compose_run("task=pretrain", "data=text", "data.path=x", "data.fields={text: body}").data
    assert isinstance(said, TextDataConfig)
    assert said.text_column == "body"
    with pytest.raises(UserError, match=r"^data\.fields\.prompt has no effect: data=text only reads the field text"):
        compose_run("task=pretrain", "data=text", "data.path=x", "data.fields={prompt: body}")


def test_the_config_of_a_run_from_before_there_were_fields_is_read(tmp_path: Path) -> None:
    said = compose_run("data=jsonl", "data.path=x", "data.prompt_field=q")
    save_config(said, tmp_path / "config.yaml")
    lines = (tmp_path / "config.yaml").read_text().splitlines(keepends=True)
    older = [line for line in lines if line.strip() not in ("fields: {}", "subset: null")]
    assert len(older) == len(lines) - 2
    (tmp_path / "config.yaml").write_text("".join(older))
    assert load_config(tmp_path / "config.yaml") == said


@pytest.mark.slow
def test_a_run_takes_the_names_on_its_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, *[{"q": f"Question {number}?", "a": f"Answer {number}."} for number in range(6)])
    done = launch(
        *("data=jsonl", f"data.path={path}", "data.fields={prompt: q, completion: b}", "dry_run=true"),
        directory=tmp_path / "run",
    )
    assert done.returncode == 2
    assert "rows.jsonl:1: field 'b' is missing (found: 'q', 'a'); data.fields.completion names it" in done.stderr


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "A"}, "A"),
        ({"question": "A", "answer": "B"}, "A"),
        ({"query": "A"}, "A"),
        ({"input": "A"}, "A"),
        ({"instruction": "A", "input": "C", "output": "B"}, "A\n\nC"),
        ({"instruction": "A", "context": "C"}, "A\n\nC"),
        ({"messages": CHAT[:1], "prompt_id": 1}, "x"),
    ],
)
def test_prompts_are_read_from_every_kind_of_file(row: dict[str, Any], asked: str, tmp_path: Path) -> None:
    path = write(tmp_path, row)
    (tmp_path / "a.json").write_text(json.dumps([row], indent=1), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    for name in (path.name, "a.json", "a.parquet"):
        (prompt,) = read_prompts(tmp_path / name, raw=False)
        assert (prompt.last, prompt.row) == (asked, row)
    (tmp_path / "a.csv").write_text('id,question\n1,Why?\n2,"a\nb"\n', encoding="utf-8")
    assert [prompt.last for prompt in read_prompts(tmp_path / "a.csv", raw=True)] == ["Why?", "a\nb"]


def test_prompts_that_ask_twice_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "A"}, {"prompt": "A", "question": "B"})
    with pytest.raises(
        UserError, match=r"rows\.jsonl:2: the row has 'prompt' and 'question', which may both be the prompt"
    ):
        read_prompts(path, raw=False)


def test_a_set_that_is_texts_and_conversations_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"instruction": "A", "output": "B", "text": "A B"})
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the row has a text and a conversation \(found: 'instruction'"):
        read_sets({"old": str(path)}, "retention.eval_sets")
    (found,) = read_sets({"old": str(write(tmp_path, {"question": "A", "answer": "B"}))}, "retention.eval_sets")
    assert found.rows == [pair("A", "B")]
