"""The generator of the fixtures and of transformers' results: ``python -m tests.support.v5`` with transformers 5.24."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.support.v5 import HERE, NAMES, RIGHT, ROWS, write_model
from tests.support.v5.texts import TEXTS

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "dtype": "float32",
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def main() -> None:
    for name, tokenizer, config in fixtures():
        directory = HERE / name
        shutil.rmtree(directory, ignore_errors=True)
        tokenizer.save_pretrained(directory)
        config.vocab_size = len(tokenizer) + 3
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.save_pretrained(directory)
    lines = [f'"{name}": {json.dumps(values(name))}' for name in NAMES]
    RIGHT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def fixtures() -> Iterator[tuple[str, Any, Any]]:
    ends = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = json.loads(byte_level([]).to_str())["model"]
    qwen = transformers.Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        extra_special_tokens=ends[1:],
        chat_template=CHAT,
    )
    qwen.add_tokens(["<tool_call>"])
    rope = {"rope_type": "default", "rope_theta": 1e6}
    yield "qwen2", qwen, transformers.Qwen2Config(**SHAPE, rope_parameters=rope, tie_word_embeddings=True)
    begin = "<|begin_of_text|>"
    tokenizer = byte_level([begin, *ends])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    llama = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=ends[0], chat_template="{{ bos_token }}" + CHAT
    )
    yield "llama", llama, transformers.LlamaConfig(**SHAPE, head_dim=24, rope_parameters=LLAMA_3)
    pieces = json.loads(sentence_pieces().to_str())["model"]
    mistral = transformers.LlamaTokenizer(
        vocab=pieces["vocab"],
        merges=[tuple(merge) for merge in pieces["merges"]],
        add_bos_token=True,
        chat_template=INST,
    )
    yield "mistral", mistral, transformers.MistralConfig(**SHAPE, rope_parameters=rope, sliding_window=None)
    qwen3 = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(ends),
        eos_token=ends[0],
        pad_token="<|pad|>",
        extra_special_tokens={"image_token": "<image>", "turn_token": ends[1]},
        chat_template={"default": CHAT.replace("<|im_start|>", "{{ turn_token }}"), "tool_use": "of tools" + CHAT},
    )
    yield "qwen3", qwen3, transformers.Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=False)


def byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(tokenizer, trainers.BpeTrainer(vocab_size=360, special_tokens=special, initial_alphabet=alphabet))
    return tokenizer


def sentence_pieces() -> Tokenizer:
    """Return a tokenizer as in Llama 2: spaces are ordinary characters, and unknown text falls back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    train(tokenizer, trainers.BpeTrainer(vocab_size=420, special_tokens=special, limit_alphabet=100))
    return tokenizer


def train(tokenizer: Tokenizer, trainer: Any) -> None:
    tokenizer.train_from_iterator(ROWS.with_suffix(".validation.jsonl").read_text().splitlines(), trainer)


@torch.no_grad()
def values(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as parent:
        directory = write_model(name, Path(parent) / name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        model, read = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
    assert not any(read.values()), read
    total, count = 0.0, 0
    for line in ROWS.with_suffix(".validation.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"][:129]])  # task.sequence_length and one more
        labels = ids.clone()
        for number, (start, _) in enumerate(encoded["offset_mapping"][:129]):
            if start < len(asked):
                labels[0, number] = -100
        tokens = int((labels != -100).sum())
        if tokens:
            total += float(model(ids, labels=labels).loss) * tokens
            count += tokens
    of_texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    special = sorted(int(token) for token in tokenizer.all_special_ids)
    return {
        "validation": total / count,
        "tokens": count,
        "special": special,
        "ids": of_texts,
        "continued": tokenizer.decode(continued(model, of_texts[0], tokenizer.eos_token_id), skip_special_tokens=True),
    }


def continued(model: Any, ids: list[int], end: int) -> list[int]:
    """Return the greedy continuation of up to eight tokens."""
    found: list[int] = []
    while len(found) < 8:
        token = int(model(torch.tensor([[*ids, *found]])).logits[0, -1].argmax())
        if token == end:
            break
        found.append(token)
    return found


if __name__ == "__main__":
    main()
