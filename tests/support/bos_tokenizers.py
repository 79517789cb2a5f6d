"""Tokenizers that begin a text with BOS, as those of Llama 2 and 3 do, trained on the bundled texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import ROOT

BOS, EOS, SPECIAL = "<s>", "</s>", ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>"]
BOS_ID, EOS_ID = 1, 2
VOCABULARY = 800
TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>{% endif %}"
)


def byte_level() -> Tokenizer:
    """Return a tokenizer like that of Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _texts(), trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return tokenizer


def prepended_space() -> Tokenizer:
    """Return a tokenizer like that of Llama 2: a space before each text, and byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[*SPECIAL, *bytes_], max_token_length=12)
    tokenizer.train_from_iterator((word for text in _texts() for word in text.split()), trainer)
    return _with_bytes_as_pieces(tokenizer)


KINDS = {"byte level": byte_level, "prepended space": prepended_space}


def save_tokenizer(directory: Path, kind: str, *, adds_bos: bool = True, **config: Any) -> PreTrainedTokenizerFast:
    """Save a tokenizer; without ``adds_bos`` it has a BOS token but never adds it, as in Qwen."""
    tokenizer = KINDS[kind]()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
        **config,
    ).save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def _texts() -> Iterator[str]:
    for name in ("text.train.jsonl", "text.validation.jsonl"):
        for line in (ROOT / "qwen_cl/demo/data" / name).read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["text"]


def _with_bytes_as_pieces(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer with bytes as vocabulary entries only, not as added tokens that a text could spell."""
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(plain))
