"""Answers before and after training, against transformers' and PEFT's own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen_cl.data.examples import Example
from qwen_cl.training.callbacks.samples import Question, question_of
from tests.conftest import ROOT, Launched

MODEL = ROOT / "qwen_cl/demo/model"


@pytest.mark.parametrize(
    ("example", "question"),
    [
        (Example([5, 6, 7, 8, 9, 4], ((3, 6),)), Question([5, 6, 7], [8, 9], frozenset({0, 4}))),
        (Example([5, 6, 7, 8, 9, 4], ((2, 4), (5, 6))), Question([5, 6], [7], frozenset({0, 8}))),
        (Example([5, 6, 7, 8, 9, 4], ((1, 6),)), Question([5, 6, 7], [8, 9], frozenset({0}))),
        (
            Example(list(range(1, 101)), ((1, 100),)),
            Question(list(range(1, 33)), [33, 34], frozenset({0})),
        ),
    ],
    ids=["answer", "first of two answers", "short text", "long text"],
)
def test_what_is_asked_of_an_example(example: Example, question: Question) -> None:
    assert question_of(example, eos=0, new_tokens=2) == question


def test_samples_are_the_greedy_answers_of_base_and_adapter(trained: Launched) -> None:
    lines = [json.loads(line) for line in trained.folder.samples.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 0, 40, 40, 40]
    rows = [
        json.loads(line)
        for line in (ROOT / "qwen_cl/demo/data/instructions.validation.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for line, row in zip(lines, [*rows[:3], *rows[:3]]):
        assert f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n" in line["prompt"]
        assert line["expected"] == row["completion"]
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    before = [_greedy(base, line["prompt"]) for line in lines[:3]]
    after = [_greedy(PeftModel.from_pretrained(base, trained.folder.adapter), line["prompt"]) for line in lines[3:]]
    assert [line["answer"] for line in lines] == [*before, *after]
    assert before != after


def _greedy(model: Any, prompt: str) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    produced = model.generate(
        input_ids=ids["input_ids"],
        attention_mask=ids["attention_mask"],
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=tokenizer.eos_token_id,
    )
    answer = produced[0, ids["input_ids"].shape[1] :].tolist()
    kept = answer[: next((index for index, token in enumerate(answer) if token in stops), len(answer))]
    return str(tokenizer.decode(kept, clean_up_tokenization_spaces=False))
