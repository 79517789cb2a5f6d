"""Conversations become the tokens that transformers makes of them, and what is trained on is what the model says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen_cl.config.errors import UserError
from qwen_cl.config.task.training import LossOn
from qwen_cl.data.chat.conversations import parse_conversation, parse_prompt
from qwen_cl.data.chat.encode import render_conversation, render_prompt, unused_fields, use_chat_settings
from qwen_cl.data.chat.settings import ChatSettings
from tests.support.chat_tokenizers import KINDS, TEMPLATES, tokenizer_of

PLACE = "rows.jsonl:7"
USER: dict[str, Any] = {"role": "user", "content": "Where is Osaka?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "Osaka is in Japan."}
AGAIN: dict[str, Any] = {"role": "user", "content": "Are you sure?"}
SORRY: dict[str, Any] = {"role": "assistant", "content": "Sorry: in Kyoto."}
SYSTEM: dict[str, Any] = {"role": "system", "content": "Answer in Osaka dialect."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def call(arguments: Any, number: int = 0) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": f"call0000{number}", "type": "function", "function": function}


CALLS: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call({"city": "大阪", "days": 2})]}
RESULT: dict[str, Any] = {"role": "tool", "content": "sunny", "name": "get_weather", "tool_call_id": "call00000"}


def ids_of(tokenizer: Any, messages: list[dict[str, Any]], **how: Any) -> list[int]:
    """transformers' own; version 5 gives a mapping."""
    made = tokenizer.apply_chat_template(messages, tokenize=True, **how)
    return list(made if isinstance(made, list) else made["input_ids"])


def trained(
    row: dict[str, Any], tokenizer: Any, loss_on: LossOn = LossOn.assistant
) -> tuple[list[int], list[str], tuple[tuple[int, int], ...]]:
    """Ids, the texts trained on, and where they are."""
    ids, spans = render_conversation(parse_conversation(row, ("prompt", "completion"), PLACE), tokenizer, loss_on)
    return ids, [tokenizer.decode(ids[start:stop]) for start, stop in spans], spans


def require_same(ids: list[int], tokenizer: Any, messages: list[dict[str, Any]], **how: Any) -> None:
    """Return the ids of transformers, without the newlines after the last end of a turn."""
    whole = ids_of(tokenizer, messages, **how)
    assert ids == whole[: len(ids)]
    assert tokenizer.decode(whole[len(ids) :]).strip(" ▁") in ("", "\n", "\n\n")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_those_of_the_whole_text(template: str, kind: str) -> None:
    tokenizer = tokenizer_of(TEMPLATES[template], kind)
    begun = [] if template in ("gemma", "mistral0.3") else [SYSTEM]
    for messages in ([USER, ANSWER], [*begun, USER, ANSWER, AGAIN, SORRY]):
        ids, texts, spans = trained({"messages": messages}, tokenizer)
        require_same(ids, tokenizer, messages)
        assert len(texts) == len(messages) // 2
        if kind == "byte_level":  # the others' decoders are for whole texts
            assert "Osaka is in Japan." in texts[0]
            assert texts[0].strip().endswith(("<|im_end|>", "</s>", "<|eot_id|>", "<end_of_turn>", "<|end|>"))
        # What the model is asked with is what comes before its first answer. Where the reasoning that a prompt begins
        # is not rendered again, that ends before it.
        asked = ids_of(tokenizer, messages[: len(messages) % 2 + 1], add_generation_prompt=True)
        if template != "deepseek-r1":
            assert ids[: spans[0][0]] == asked


EXPECTED = {
    "chatml": ["Osaka is in Japan.<|im_end|>", "Sorry: in Kyoto.<|im_end|>"],
    "qwen2.5": ["Osaka is in Japan.<|im_end|>", "Sorry: in Kyoto.<|im_end|>"],
    "qwen3": ["Osaka is in Japan.<|im_end|>", "<think>\n\n</think>\n\nSorry: in Kyoto.<|im_end|>"],
    "llama2": [" Osaka is in Japan. </s>", " Sorry: in Kyoto. </s>"],
    "llama3.1": ["Osaka is in Japan.<|eot_id|>", "Sorry: in Kyoto.<|eot_id|>"],
    "mistral0.3": [" Osaka is in Japan.</s>", " Sorry: in Kyoto.</s>"],
    "gemma": ["Osaka is in Japan.<end_of_turn>", "Sorry: in Kyoto.<end_of_turn>"],
    "phi3": ["Osaka is in Japan.<|end|>", "Sorry: in Kyoto.<|end|>\n</s>"],
    "deepseek-r1": ["Osaka is in Japan.</s>", "Sorry: in Kyoto.</s>"],
    "generation": ["Osaka is in Japan.<|im_end|>\n", "Sorry: in Kyoto.<|im_end|>\n"],
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_trained_on(template: str) -> None:
    tokenizer, messages = tokenizer_of(TEMPLATES[template]), [USER, ANSWER, AGAIN, SORRY]
    expected = EXPECTED[template]
    assert trained({"messages": messages}, tokenizer)[1] == expected
    assert trained({"messages": messages}, tokenizer, LossOn.last_assistant)[1] == expected[1:]
    ids, texts, spans = trained({"messages": messages}, tokenizer, LossOn.all)
    assert spans == ((1, len(ids)),)
    wrong = [USER, {**ANSWER, "weight": 0}, AGAIN, {**SORRY, "weight": 1}]
    assert trained({"messages": wrong}, tokenizer)[:2] == (ids, expected[1:])
    _, texts, _ = trained({"messages": wrong}, tokenizer, LossOn.all)
    assert "Osaka is in Japan." not in "".join(texts)
    assert "Are you sure?" in "".join(texts)
    unlearned = [USER, ANSWER, AGAIN, {**SORRY, "train": False}]
    assert trained({"messages": unlearned}, tokenizer, LossOn.last_assistant)[1] == []


def test_generation_blocks_are_transformers_own_mask() -> None:
    tokenizer, messages = tokenizer_of(TEMPLATES["generation"]), [SYSTEM, USER, ANSWER, AGAIN, SORRY]
    made = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, _, spans = trained({"messages": messages}, tokenizer)
    assert ids == made["input_ids"]
    mask = [int(any(start <= index < stop for start, stop in spans)) for index in range(len(ids))]
    assert mask == made["assistant_masks"]


def test_reasoning_is_rendered_where_the_template_does() -> None:
    tokenizer = tokenizer_of(TEMPLATES["qwen3"])
    for key in ("reasoning_content", "thinking", "reasoning"):
        messages = [USER, {**ANSWER, key: "I recall it."}]
        ids, texts, _ = trained({"messages": messages}, tokenizer)
        require_same(ids, tokenizer, [USER, {**ANSWER, "reasoning_content": "I recall it."}])
        assert texts == ["<think>\nI recall it.\n</think>\n\nOsaka is in Japan.<|im_end|>"]
    earlier = [USER, {**ANSWER, "reasoning_content": "I recall it."}, AGAIN, SORRY]
    ids, texts, _ = trained({"messages": earlier}, tokenizer)  # the template takes it out: that is its author's wish
    require_same(ids, tokenizer, earlier)
    assert texts == EXPECTED["qwen3"]
    column = {"prompt": "Where is Osaka?", "completion": "Osaka is in Japan.", "reasoning": "I recall it."}
    assert trained(column, tokenizer)[1] == ["<think>\nI recall it.\n</think>\n\nOsaka is in Japan.<|im_end|>"]
    inline = [USER, {**ANSWER, "content": "<think>\nhm\n</think>\n\nIn Japan."}, AGAIN, SORRY]
    ids, texts, _ = trained({"messages": inline}, tokenizer)
    require_same(ids, tokenizer, inline)
    assert texts[0] == "In Japan.<|im_end|>"


@pytest.mark.parametrize("template", ["qwen2.5", "qwen3", "mistral0.3", "llama3.1"])
def test_tools_and_their_calls(template: str) -> None:
    tokenizer = tokenizer_of(TEMPLATES[template])
    messages = [USER, CALLS, RESULT, ANSWER, AGAIN, SORRY]
    ids, texts, _ = trained({"messages": messages, "tools": TOOLS}, tokenizer)
    require_same(ids, tokenizer, messages, tools=TOOLS)
    assert len(texts) == 3
    assert all(part in texts[0] for part in ("get_weather", '"city": "大阪"', '"days": 2'))
    assert "sunny" not in "".join(texts)
    # The same as JSON in strings, and in LLaMA-Factory's ShareGPT.
    as_text = [USER, {**CALLS, "tool_calls": [call('{"city": "大阪", "days": 2}')]}, *messages[2:]]
    assert trained({"messages": as_text, "tools": json.dumps(TOOLS)}, tokenizer)[:2] == (ids, texts)
    if template != "mistral0.3":  # which wants an id of each call
        roles = ["human", "function_call", "observation", "gpt", "human", "gpt"]
        said = [each["content"] for each in messages]
        said[1] = '{"name": "get_weather", "arguments": {"city": "大阪", "days": 2}}'
        turns = [{"from": role, "value": text} for role, text in zip(roles, said)]
        assert trained({"conversations": turns, "tools": json.dumps(TOOLS)}, tokenizer)[:2] == (ids, texts)


def test_text_beside_tool_calls_is_rendered_or_refused() -> None:
    row: dict[str, Any] = {"messages": [USER, {**CALLS, "content": "Let me look."}], "tools": TOOLS}
    ids, texts, _ = trained(row, tokenizer_of(TEMPLATES["qwen2.5"]))
    require_same(ids, tokenizer_of(TEMPLATES["qwen2.5"]), row["messages"], tools=TOOLS)
    assert texts[0].startswith("Let me look.\n<tool_call>")
    with pytest.raises(UserError, match=r"^rows\.jsonl:7: content of message 2 \(assistant\) is left out by"):
        trained(row, tokenizer_of(TEMPLATES["mistral0.3"]))


def test_columns_beside_the_conversation() -> None:
    tokenizer = tokenizer_of(TEMPLATES["qwen2.5"])
    whole = [SYSTEM, USER, ANSWER, AGAIN, SORRY]
    expected = trained({"messages": whole}, tokenizer)
    turns = [
        {"from": {"user": "human", "assistant": "gpt"}[each["role"]], "value": each["content"]} for each in whole[1:]
    ]
    history = [[USER["content"], ANSWER["content"]]]
    for row in (
        {"messages": whole[1:], "system": SYSTEM["content"]},
        {"messages": whole, "system": SYSTEM["content"]},
        {"conversations": turns, "system": SYSTEM["content"], "tools": ""},
        {"conversations": whole[1:], "system_prompt": SYSTEM["content"], "tools": "[]", "history": None},
        {
            "instruction": AGAIN["content"],
            "input": "",
            "output": SORRY["content"],
            "system": SYSTEM["content"],
            "history": history,
        },
        {"prompt": AGAIN["content"], "completion": SORRY["content"], "system": SYSTEM["content"], "history": history},
        {"messages": [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in whole]},
        {"messages": [{**each, "tool_calls": None, "name": "", "weight": None} for each in whole], "images": []},
        {"messages": json.dumps(whole)},
    ):
        assert trained(row, tokenizer) == expected, row
    asked = {"prompt": [SYSTEM, USER, ANSWER, AGAIN], "completion": [SORRY]}  # TRL's: what is prompted with is context
    assert trained(asked, tokenizer)[:2] == (expected[0], expected[1][1:])


def test_calls_are_given_in_openais_form() -> None:
    tokenizer = tokenizer_of(TEMPLATES["llama3.1"])
    whole = trained({"messages": [USER, {**CALLS, "tool_calls": [call({})]}]}, tokenizer)
    for bare in (
        {"name": "get_weather"},
        {"name": "get_weather", "arguments": ""},
        {"function": {"name": "get_weather"}},
    ):
        assert trained({"messages": [USER, {**CALLS, "tool_calls": [bare]}]}, tokenizer) == whole
    null = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call({})]}]}
    with pytest.raises(UserError, match=r"^rows\.jsonl:7: tool_calls of message 2 \(assistant\) is left out"):
        trained(null, tokenizer_of(TEMPLATES["chatml"]))


def test_template_arguments() -> None:
    tokenizer = tokenizer_of(TEMPLATES["qwen3"])
    for row in (
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [USER, ANSWER], "enable_thinking": False},
    ):
        ids, texts, _ = trained(row, tokenizer)
        require_same(ids, tokenizer, [USER, ANSWER], enable_thinking=False)
        assert texts == ["Osaka is in Japan.<|im_end|>"]  # the empty reasoning is of the prompt then
    for name in ("enable_thinking", "tokenize", "chat_template"):
        wrong = {"messages": [USER, ANSWER], "chat_template_kwargs": {name: False}}
        with pytest.raises(UserError, match=rf"^rows\.jsonl:7: .*{name}"):
            trained(wrong, tokenizer_of(TEMPLATES["chatml"]))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "reasoning": (
        "qwen2.5",
        {"messages": [USER, {**ANSWER, "reasoning_content": "hm"}]},
        "reasoning_content of message 2",
    ),
    "name": ("qwen2.5", {"messages": [{**USER, "name": "Ann"}, ANSWER]}, r"name of message 1 \(user\)"),
    "tools": ("chatml", {"messages": [USER, ANSWER], "tools": TOOLS}, "tools is left out"),
    "tool calls": ("phi3", {"messages": [USER, {**ANSWER, "tool_calls": [call({})]}]}, "tool_calls of message 2"),
    "developer": (
        "qwen3",
        {"messages": [{"role": "developer", "content": "Be brief."}, USER, ANSWER]},
        r"content of message 1 \(developer\) is left out",
    ),
    "refusal": ("chatml", {"messages": [USER, {**ANSWER, "refusal": "No."}]}, "refusal of message 2"),
    "system": ("gemma", {"messages": [SYSTEM, USER, ANSWER]}, "refuses this conversation: System role not supported"),
    "speaks first": (
        "gemma",
        {"messages": [ANSWER, USER, SORRY]},
        "refuses this conversation: Conversation roles must",
    ),
    "no list": ("qwen2.5", {"messages": [USER, {**ANSWER, "tool_calls": "no JSON"}]}, "tool_calls should hold JSON"),
    "call": ("qwen2.5", {"messages": [USER, {**ANSWER, "tool_calls": [{"id": "1"}]}]}, r"tool_calls\[0\] must be an"),
    "arguments": ("qwen2.5", {"messages": [USER, {**ANSWER, "tool_calls": [call("{")]}]}, "arguments should hold JSON"),
    "weight": ("qwen2.5", {"messages": [USER, {**ANSWER, "weight": 0.5}]}, r"weight \(0\.5\) must be 0"),
    "weight of a user": ("qwen2.5", {"messages": [{**USER, "weight": 1}, ANSWER]}, r"weight \(1\) is of the user"),
    "two weights": (
        "qwen2.5",
        {"messages": [USER, {**ANSWER, "weight": 0, "train": True}]},
        "weight and train, which dis",
    ),
    "row's weight": ("qwen2.5", {"messages": [USER, ANSWER], "weight": 0.3}, "field 'weight' weights a whole row"),
    "detail": (
        "qwen2.5",
        {"messages": [USER, {**ANSWER, "train_detail": [{"begin_offset": 0}]}]},
        "train_detail is not",
    ),
    "image": (
        "qwen2.5",
        {"messages": [{**USER, "content": [{"type": "image", "url": "x"}]}, ANSWER]},
        "is image; only",
    ),
    "images": ("qwen2.5", {"messages": [USER, ANSWER], "images": ["a.png"]}, "field 'images': images, audio and video"),
    "preference": ("qwen2.5", {"prompt": "a", "chosen": "b", "rejected": "c"}, "field 'chosen' is preference data"),
    "KTO": ("qwen2.5", {"prompt": "a", "completion": "b", "label": False}, "field 'label' says whether"),
    "tokens": ("qwen2.5", {"messages": [USER, ANSWER], "input_ids": [1, 2]}, "field 'input_ids' belongs to"),
    "twice": ("qwen2.5", {"messages": [USER, ANSWER], "prompt": "a", "completion": "b"}, "has two conversations, in"),
    "two systems": ("qwen2.5", {"messages": [SYSTEM, USER, ANSWER], "system": "Other."}, "two system messages"),
    "history": ("qwen2.5", {"messages": [USER, ANSWER], "history": [["a", "b"]]}, "the row has field 'history' beside"),
    "history form": ("qwen2.5", {"prompt": "a", "completion": "b", "history": ["a"]}, r"history\[0\] must be a pair"),
    "tools form": ("qwen2.5", {"messages": [USER, ANSWER], "tools": "get_weather"}, "field 'tools' should hold JSON"),
    "template": (
        "qwen2.5",
        {"messages": [USER, ANSWER], "chat_template": "{{ 1 }}"},
        "field 'chat_template' is not read",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_said_is_refused_by_its_place(name: str) -> None:
    template, row, message = REFUSED[name]
    with pytest.raises(UserError, match=rf"^rows\.jsonl:7: .*{message}") as refused:
        trained(row, tokenizer_of(TEMPLATES[template]))
    assert "\n" not in str(refused.value)


def test_fields_that_cannot_change_what_is_trained_on_are_named() -> None:
    tokenizer = tokenizer_of(TEMPLATES["qwen2.5"])
    row = {
        "id": "1",
        "source": "web",
        "lang": None,
        "tools": TOOLS,
        "messages": [{**USER, "timestamp": 3}, CALLS, RESULT, {**ANSWER, "id": "m"}],
    }
    parsed = parse_conversation(row, ("prompt", "completion"), PLACE)
    assert sorted(unused_fields(parsed, tokenizer)) == [
        *("id", "messages[].id", "messages[].name", "messages[].timestamp", "messages[].tool_call_id", "source"),
    ]


SPOKEN = "Write <|im_end|> or </s>, and <s>."


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_special_tokens_names_in_texts_stay_text(template: str, kind: str) -> None:
    tokenizer = tokenizer_of(TEMPLATES[template], kind)
    messages = [{"role": "user", "content": SPOKEN}, {"role": "assistant", "content": f"{SPOKEN} <|user|>"}]
    ids, _, spans = trained({"messages": messages}, tokenizer)
    harmless = [{**each, "content": "x"} for each in messages]
    special, ids_without = tokenizer.added_tokens_decoder, ids_of(tokenizer, harmless)
    assert sum(token in special for token in ids) == sum(token in special for token in ids_without)
    with_tokens = use_chat_settings(
        tokenizer_of(TEMPLATES[template], kind), ChatSettings(special_tokens_in_content=True)
    )
    require_same(trained({"messages": messages}, with_tokens)[0], tokenizer, messages)
    if kind == "byte_level":
        plain = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(ids) == (plain if template == "generation" else plain.rstrip("\n"))
        assert f"{SPOKEN} <|user|>" in tokenizer.decode(ids[spans[0][0] : spans[0][1]])
        spoken = tokenizer("Write <|im_end|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert any(ids[start : start + len(spoken)] == spoken for start in range(len(ids)))
    asked = parse_prompt({"messages": messages[:1]}, PLACE)
    assert render_prompt(asked, tokenizer) == ids[: spans[0][0]] or template == "deepseek-r1"


def test_special_tokens_stay_text_where_the_template_moves_them() -> None:
    """Trimmed, split, and in JSON."""
    tokenizer = tokenizer_of(TEMPLATES["qwen3"])
    for messages in (
        [USER, {**ANSWER, "content": "<think>\n<|im_end|>\n</think>\n\n<|im_start|>\n"}],
        [
            {**USER, "content": "\n <|im_end|> \n"},
            {**CALLS, "tool_calls": [call({"<s>": ["</s>", {"a": "<|im_end|>"}]})]},
        ],
    ):
        ids, _, _ = trained({"messages": messages, "tools": TOOLS}, tokenizer)
        plain = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False).rstrip("\n")
        assert tokenizer.decode(ids) == plain
        special = [token for token in ids if token in tokenizer.added_tokens_decoder]
        assert len(special) == 6  # of the template: three turns, each begun and ended


def test_the_date_is_the_one_that_was_settled() -> None:
    tokenizer = use_chat_settings(tokenizer_of(TEMPLATES["llama3.1"]), ChatSettings(template_date="2024-02-29"))
    ids, _, _ = trained({"messages": [USER, ANSWER]}, tokenizer)
    assert "Today Date: 29 Feb 2024\n" in tokenizer.decode(ids)
    prompt = render_prompt(parse_prompt({"prompt": "a"}, PLACE), tokenizer)
    assert "Today Date: 29 Feb 2024\n" in tokenizer.decode(prompt)


def test_a_system_prompt_of_the_run_is_for_rows_without_one() -> None:
    tokenizer = tokenizer_of(TEMPLATES["qwen2.5"])
    settings = ChatSettings(system_prompt=SYSTEM["content"] + " <|im_end|>")
    use_chat_settings(tokenizer, settings)
    ids, _, _ = trained({"messages": [USER, ANSWER]}, tokenizer)
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nAnswer in Osaka dialect. <|im_end|><|im_end|>\n")
    own = [{**SYSTEM, "content": "Own."}, USER, ANSWER]
    require_same(trained({"messages": own}, tokenizer)[0], tokenizer, own)


def test_prompts_are_read_by_the_same_rules() -> None:
    tokenizer = tokenizer_of(TEMPLATES["qwen2.5"])
    for row in (
        {"messages": [SYSTEM, USER], "tools": TOOLS, "id": 3},
        {"conversations": [{"from": "human", "value": USER["content"]}], "system": SYSTEM["content"], "tools": TOOLS},
        {"prompt": USER["content"], "system": SYSTEM["content"], "tools": json.dumps(TOOLS)},
        {"instruction": "Where is Osaka?", "system": SYSTEM["content"], "tools": TOOLS, "input": ""},
    ):
        ids = render_prompt(parse_prompt(row, PLACE), tokenizer)
        assert ids == ids_of(tokenizer, [SYSTEM, USER], tools=TOOLS, add_generation_prompt=True)
    with pytest.raises(UserError, match=r"^rows\.jsonl:7: .* refuses this conversation: System role not supported"):
        render_prompt(parse_prompt({"prompt": "a", "system": "b"}, PLACE), tokenizer_of(TEMPLATES["gemma"]))
