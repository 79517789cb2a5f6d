"""Build the bundled demo model, untrained, with the same bytes every time.

Usage: ``python -m qwen_cl.demo.build_model TEXTS OUTPUT``.

Qwen2.5's architecture (tied embeddings, biased q, k and v, grouped queries) at a laptop's size, with random weights to
train from scratch, and its own byte-level BPE with Qwen2.5's special tokens and ChatML template. TEXTS is the output
of ``python -m benchmarks.texts``; the vocabulary is learned from a sample of both languages. README.md in this folder
describes the training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.filesize import decimal
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from qwen_cl.config.errors import UserError

VOCABULARY = 4096
# Bytes of text that the vocabulary is learned from. A quarter is Japanese, so that both languages take few tokens.
SAMPLE = {"english": 15_000_000, "japanese": 5_000_000}

# In the order of Qwen2.5's ids; the first three matter for training.
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
ADDED_TOKENS = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]

# Qwen2's own pre-tokenization (transformers, Qwen2Tokenizer).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def build_tokenizer(texts: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    reserved = len(SPECIAL_TOKENS) + len(ADDED_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - reserved, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],  # the class's own list has token_type_ids
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def _sample(texts: Path) -> Iterator[str]:
    """Yield complete documents, evenly spaced over each file, so that every source package is represented."""
    for language, size in SAMPLE.items():
        path = texts / f"{language}.train.jsonl"
        due = 0.0
        share = min(1.0, size / path.stat().st_size)
        for line in path.read_text(encoding="utf-8").splitlines():
            due += share * len(line.encode())
            if due >= len(line.encode()):
                due -= len(line.encode())
                yield json.loads(line)["text"]


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_theta=1000000.0,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        torch_dtype="bfloat16",
    )
    return Qwen2ForCausalLM(config).to(torch.bfloat16)


def build(texts: Path, output: Path) -> None:
    for language in SAMPLE:
        if not (path := texts / f"{language}.train.jsonl").is_file():
            raise UserError(f"{path}: no such file; python -m benchmarks.texts {texts} makes it")
    tokenizer = build_tokenizer(texts)
    if len(tokenizer) < VOCABULARY:
        raise UserError(f"{texts}: its texts give {len(tokenizer)} tokens, {VOCABULARY} are wanted; use more text")
    model = build_model(tokenizer)
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f"{output}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens, {decimal(size, precision=2)}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qwen_cl.demo.build_model", description=__doc__)
    parser.add_argument("texts", type=Path, help="a directory that python -m benchmarks.texts wrote")
    parser.add_argument("output", type=Path, help="where the model goes, in Hugging Face layout")
    arguments = parser.parse_args()
    try:
        build(arguments.texts, arguments.output)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
