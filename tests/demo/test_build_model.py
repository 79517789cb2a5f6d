"""The embedded model before its training: from texts to a directory in Hugging Face layout."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_cl.config.errors import UserError
from qwen_cl.demo.build_model import ADDED_TOKENS, SPECIAL_TOKENS, build

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "qwen_cl/demo/data"
SOURCES = {
    "english": ["replay-english.train.jsonl", "retention-english.jsonl"],
    "japanese": ["text.train.jsonl", "instructions.train.jsonl"],
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("texts")
    for language, names in SOURCES.items():
        lines = [line for name in names for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
        rows = [json.dumps({"text": " ".join(json.loads(line).values())}, ensure_ascii=False) for line in lines]
        (directory / f"{language}.train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def model(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    build(texts, directory)
    return directory


def test_the_same_texts_give_the_same_bytes(texts: Path, model: Path, tmp_path: Path) -> None:
    build(texts, tmp_path / "again")
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert sum(map(len, files.values())) <= 8_000_000


def test_its_shape_can_be_split_in_two_and_its_size_is_as_reckoned(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    hidden, ffn, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, groups, head = config["num_attention_heads"], config["num_key_value_heads"], hidden // 6
    assert [value % 2 for value in (layers, heads, groups, config["vocab_size"])] == [0, 0, 0, 0]
    attention = hidden * (heads + 2 * groups) * head + (heads + 2 * groups) * head + heads * head * hidden
    expected = config["vocab_size"] * hidden + layers * (attention + 3 * hidden * ffn + 2 * hidden) + hidden
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == expected == 2_362_304


def test_it_knows_nothing_yet(model: Path) -> None:
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    row = json.loads((DATA / "text.validation.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"]
    ids = torch.tensor([tokenizer(row).input_ids])
    with torch.no_grad():
        assert loaded(ids, labels=ids).loss.item() == pytest.approx(math.log(4096), abs=0.15)


def test_its_tokens_cover_both_languages_and_qwen_s_own(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(tokenizer) == 4096
    assert tokenizer.convert_ids_to_tokens(range(4096 - 22, 4096)) == SPECIAL_TOKENS + ADDED_TOKENS
    text = "The program reads the file. このコマンドは、ファイルを表示します。 Ünïcode 🙂"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("この").input_ids) == len(tokenizer(" the").input_ids) == 1
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert rendered == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\na<|im_end|>\n")


@pytest.mark.slow
def test_texts_that_are_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "qwen_cl.demo.build_model", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        f"{tmp_path}/english.train.jsonl: no such file; python -m benchmarks.texts {tmp_path} makes it" in done.stderr
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_texts_that_are_too_short(tmp_path: Path) -> None:
    for language in SOURCES:
        (tmp_path / f"{language}.train.jsonl").write_text('{"text": "the same words"}\n')
    with pytest.raises(UserError, match=r"its texts give \d+ tokens, 4096 are wanted; use more text"):
        build(tmp_path, tmp_path / "out")


def test_the_embedded_model_is_small() -> None:
    assert 0 < sum(path.stat().st_size for path in (ROOT / "qwen_cl/demo/model").iterdir()) <= 8_000_000
