"""Rows on disk become the batches of a training step."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qwen_cl.config.errors import UserError
from qwen_cl.config.task.training import LossOn
from qwen_cl.data.chat.conversations import Conversation, Message, pair
from qwen_cl.data.examples import Example, build_examples, load_data_tokenizer
from qwen_cl.data.rows import Row, RowFiles, Text, content_hash, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "qwen_cl/demo"
PAIR = b'{"prompt": "a", "completion": "b"}\n'


def files(path: Path, validation: Path | None = None, every: int = 3, *, text: bool = False) -> RowFiles:
    return RowFiles(
        train=str(path),
        validation=None if validation is None else str(validation),
        validation_every=every,
        raw_text=text,
        fields={},
    )


def demo_rows(kind: str) -> list[Row]:
    """Training and validation rows, one after the other."""
    stem = DEMO / "data" / kind
    train, validation = read_rows(
        files(Path(f"{stem}.train.jsonl"), Path(f"{stem}.validation.jsonl"), text=kind == "text")
    )
    return train + validation


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    return load_data_tokenizer(str(DEMO / "model"))


def tokens(text: str) -> list[int]:
    return list(tokenizer()(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PAIR + b"nonsense\n", "{path}:2: not JSON (Expecting value at column 1); every line is one object"),
        (PAIR * 4 + b'{"prompt":\n' + PAIR, "{path}:5: not JSON (Expecting value at column 11)"),
        (b"\n \r\n" + PAIR + b"3\n", "{path}:4: a number, it must be an object with fields"),
        (
            PAIR + b'{"prompt": "a", "completion": null}\n',
            "{path}:2: field 'completion' is null, it must be a string",
        ),
        (PAIR + b'{"prompt": "\\u3000", "completion": "b"}', "{path}:2: field 'prompt' is empty; remove the row"),
        (
            PAIR + b'{"completion": "a"}\n',
            "{path}:2: field 'prompt' is missing (found: 'completion'); rename it, or set data.fields.prompt",
        ),
        (PAIR + b'{"text": "a"}\n', "{path}:2: no instruction form has these fields (found: 'text'); write prompt"),
        (PAIR + b"{}\n", "{path}:2: no instruction form has these fields (found: none)"),
        (b'{"messages": []}\n', "{path}:1: field 'messages' must be a list of messages with role and content"),
        (b'{"messages": [{"role": "user"}]}\n', "{path}:1: messages[0] must be an object with role and content"),
        (
            b'{"messages": [{"role": "wizard", "content": "a"}]}\n',
            "{path}:1: messages[0].role (wizard) must be one of system, developer, user, assistant, tool",
        ),
        (
            b'{"conversations": [{"from": ["gpt"], "value": "a"}]}\n',
            "{path}:1: conversations[0].from (['gpt']) must be one of system, developer, user, assistant",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}\n',
            "{path}:1: messages[1] is a system message, which may only come first",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"}]}\n',
            "{path}:1: messages ends with a message of the user, which nothing answers; cut it",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}\n',
            "{path}:1: messages[1].content is empty; remove the row or fill it",
        ),
        (b'{"instruction": "a"}\n', "{path}:1: field 'output' is missing (found: 'instruction')"),
        (
            b'{"instruction": "a", "input": 1, "output": "b"}\n',
            "{path}:1: field 'input' is a number, it must be a string",
        ),
        (PAIR + '{"prompt": "é"}\n'.encode("latin-1"), "{path}:2: byte 0xe9 at column 13 is not UTF-8"),
        (b"\n\n", "{path} is empty; it must hold rows, of conversations"),
        # Half of an emoji, which \u escapes can write and no tokenizer can read.
        (PAIR + b'{"prompt": "a", "completion": "\\ud83d"}\n', "{path}:2: field 'completion'"),
        (PAIR + b"[" * 100_000 + b"\n", "{path}:2: "),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:40],
)
def test_a_bad_row_is_named_by_its_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_rows(files(path))
    assert str(refused.value).startswith(message.format(path=path))


def test_a_missing_field_of_raw_text_names_its_key(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"body": "a"}\n')
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: field 'text' is missing .*, or set data\.fields=\{text: NAME\}$"
    ):
        read_rows(files(path, text=True))


def test_blank_lines_and_byte_order_marks_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + PAIR + b"\n  \r\n" + '{"prompt": "二", "completion": "c"}'.encode())
    validation = tmp_path / "validation.jsonl"
    validation.write_bytes(PAIR)
    train, held_out = read_rows(files(path, validation))
    assert train == [pair("a", "b"), pair("二", "c")]
    assert held_out == [pair("a", "b")]


def test_held_out_rows_are_every_nth_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": str(number)}) + "\n" for number in range(10)), encoding="utf-8")
    train, held_out = read_rows(files(path, text=True))
    assert held_out == [Text(text) for text in "0369"]
    assert train == [Text(text) for text in "124578"]
    assert read_rows(files(path, text=True)) == (train, held_out)


def test_content_hash_is_of_all_bytes_of_both_files(tmp_path: Path) -> None:
    train, validation = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    train.write_bytes(PAIR * 50_000)  # more than is read at once
    validation.write_bytes(PAIR)
    assert content_hash(files(train)) == hashlib.sha256(PAIR * 50_000).hexdigest()
    assert content_hash(files(train, validation)) == hashlib.sha256(PAIR * 50_001).hexdigest()
    for path in (train, validation):
        before = content_hash(files(train, validation))
        path.write_bytes(path.read_bytes()[:-3] + b'"}\r')
        assert content_hash(files(train, validation)) != before


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ({"prompt": "a", "completion": "b"}, "ua"),
        ({"question": "no", "prompt": "a", "completion": "b", "messages": "unused"}, "ua"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "ua"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "ua"),
        ({"instruction": "a", "output": "b"}, "ua"),
        ({"instruction": "a", "input": "", "output": "b"}, "ua"),
        (
            {"messages": [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]},
            "sua",
        ),
        (
            {"conversations": [{"from": role, "value": "x"} for role in ("human", "gpt", "human", "gpt")]},
            "uaua",
        ),
    ],
)
def test_a_rows_form_is_detected_by_its_keys(row: dict[str, Any], roles: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(row) + "\n") * 2, encoding="utf-8")
    (found,), _ = read_rows(files(path, every=2))
    assert isinstance(found, Conversation)
    assert "".join(message.role[0] for message in found.messages) == roles
    if len(found.messages) == 2:
        assert found == pair("a", "b")


def test_an_alpaca_input_follows_its_instruction(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"instruction": "Translate.", "input": "cat", "output": "neko"}\n' * 2)
    assert read_rows(files(path, every=2))[0] == [pair("Translate.\n\ncat", "neko")]


def test_labels_are_the_answer_and_its_end() -> None:
    rows = demo_rows("instructions")
    for row, example in zip(rows, build_examples(rows, tokenizer(), 2048)):
        assert isinstance(row, Conversation)
        prompt, completion = (message.content for message in row.messages)
        ((start, stop),) = example.loss_spans
        masked, labels = example.ids[:start], example.ids[start:]
        assert stop == len(example.ids)
        assert labels == tokens(completion + "<|im_end|>")
        assert labels[-1] == tokenizer().convert_tokens_to_ids("<|im_end|>")
        # The tokenizer composes accents (NFC), as Qwen's does.
        assert tokenizer().decode(labels) == unicodedata.normalize("NFC", completion) + "<|im_end|>"
        question = [{"role": "user", "content": prompt}]
        assert masked == tokenizer().apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        assert tokenizer().decode(masked).endswith(f"{prompt}<|im_end|>\n<|im_start|>assistant\n")
        assert example.num_labels == len(labels)


@pytest.mark.parametrize(
    ("loss_on", "counted"),
    [
        (LossOn.assistant, ["一つ目の答え<|im_end|>", "二つ目<|im_end|>"]),
        (LossOn.last_assistant, ["二つ目<|im_end|>"]),
        (LossOn.all, None),
    ],
)
def test_which_tokens_of_a_conversation_count(loss_on: LossOn, counted: list[str] | None) -> None:
    turns = [("system", "簡潔に。"), ("user", "一?"), ("assistant", "一つ目の答え"), ("user", "二?")]
    row = Conversation(tuple(Message(*turn) for turn in [*turns, ("assistant", "二つ目")]))
    (example,) = build_examples([row], tokenizer(), 2048, loss_on)
    messages = [{"role": message.role, "content": message.content} for message in row.messages]
    whole = tokenizer().apply_chat_template(messages, tokenize=False).rstrip("\n")
    assert tokenizer().decode(example.ids) == whole
    if counted is None:
        assert example.loss_spans == ((1, len(example.ids)),)
    else:
        assert [tokenizer().decode(example.ids[start:stop]) for start, stop in example.loss_spans] == counted


@pytest.mark.parametrize("past_prompt", [-5, 0, 1, 4])
def test_a_long_row_is_cut_and_keeps_the_labels_before_the_cut(past_prompt: int) -> None:
    rows: list[Row] = [pair("三つ挙げてください。", "青森県、秋田県、宮城県の三県を挙げます。")]
    (whole,) = build_examples(rows, tokenizer(), 2048)
    start = whole.loss_spans[0][0]
    (cut,) = build_examples(rows, tokenizer(), start - 1 + past_prompt)
    kept = ((start, start + past_prompt),) if past_prompt > 0 else ()
    assert cut == Example(whole.ids[: start + past_prompt], kept)
    assert cut.num_labels == max(0, past_prompt)
    assert cut.num_labels < whole.num_labels


def test_packed_sequences_make_every_token_of_the_texts_a_label_once() -> None:
    rows = demo_rows("text")
    stream: list[int] = [tokenizer().eos_token_id]
    for row in rows:
        assert isinstance(row, Text)
        stream += [*tokens(row.text), tokenizer().eos_token_id]
    assert stream.count(tokenizer().convert_tokens_to_ids("<|endoftext|>")) == len(rows) + 1
    # Also where the text ends with a sequence, one token before and one after.
    for length in (64, len(stream) - 2, len(stream) - 1, len(stream), (len(stream) - 1) // 2):
        examples = list(build_examples(rows, tokenizer(), length))
        assert all(len(example.ids) == length + 1 for example in examples[:-1])
        assert 2 <= len(examples[-1].ids) <= length + 1
        assert examples[0].ids[0] == stream[0]
        assert [token for example in examples for token in example.ids[1:]] == stream[1:]
        assert all(before.ids[-1] == after.ids[0] for before, after in itertools.pairwise(examples))
        assert sum(example.num_labels for example in examples) == len(stream) - 1


def test_no_rows_make_no_examples() -> None:
    assert list(build_examples([], tokenizer(), 8)) == []


def test_collate_shifts_labels_and_masks_what_does_not_count() -> None:
    from qwen_cl.data.collate import collate

    instruction, text = Example([5, 6, 7, 8, 9], ((2, 3), (4, 5))), Example([1, 2, 3], ((1, 3),))
    uncounted = Example([4, 5, 6], ())
    batch: dict[str, Any] = collate([instruction, text, uncounted])
    assert {name: (tuple(value.shape), str(value.dtype)) for name, value in batch.items()} == {
        "tokens": ((3, 16), "torch.int64"),
        "labels": ((3, 16), "torch.int64"),
        "loss_mask": ((3, 16), "torch.float32"),
        "position_ids": ((3, 16), "torch.int64"),
    }
    assert batch["tokens"][:, :5].tolist() == [[5, 6, 7, 8, 0], [1, 2, 0, 0, 0], [4, 5, 0, 0, 0]]
    assert batch["labels"][:, :5].tolist() == [[6, 7, 8, 9, 0], [2, 3, 0, 0, 0], [5, 6, 0, 0, 0]]
    assert batch["loss_mask"][:, :5].tolist() == [[0, 1, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert batch["loss_mask"].sum(1).tolist() == [example.num_labels for example in (instruction, text, uncounted)]
    assert batch["position_ids"].tolist() == [list(range(16))] * 3
    assert [collate([Example([1] * size, ((1, size),))])["tokens"].shape[1] for size in (2, 17, 18, 34)] == [
        16,
        16,
        32,
        48,
    ]


@pytest.mark.parametrize(("kind", "keys"), [("instructions", ["prompt", "completion"]), ("text", ["text"])])
def test_demo_data_never_validates_on_what_it_trains_on(kind: str, keys: list[str]) -> None:
    rows = demo_rows(kind)
    lines = [path.read_text(encoding="utf-8") for path in sorted((DEMO / "data").glob(f"{kind}.*.jsonl"))]
    records = [json.loads(line) for line in "".join(lines).splitlines()]
    assert len(lines) == 2
    assert all(list(record) == keys for record in records)
    firsts = {" ".join(record[keys[0]].split()) for record in records}
    assert len(firsts) == len(records) == len(rows)
    assert len(rows) >= (300 if kind == "instructions" else 90)
