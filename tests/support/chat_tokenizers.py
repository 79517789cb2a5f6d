"""Shortened chat templates of models on the Hub, and tokenizers of the kinds that they are used with."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>"),
    *("<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "<bos>", "<|User|>", "<|Assistant|>"),
]

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
}
TRAINING_TEXT = [
    "Where is Osaka? Osaka is in Japan. Are you sure? Let me look up the weather in Kyoto, please.",
    "system user assistant tool model think tools name arguments function parameters description object city string",
    "大阪はどこですか。日本にあります。 The capital of Japan is Tokyo, and that of France is Paris.\n\n",
] * 20
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pre-tokenization pattern of Qwen and Llama 3."""
KINDS = ("byte_level", "metaspace", "legacy")


@functools.cache
def tokenizer_object(kind: str) -> Tokenizer:
    """Train a tokenizer: ``byte_level`` as in Qwen and Llama 3; ``metaspace`` and ``legacy``, Llama 2's new and old."""
    if kind == "byte_level":
        made = Tokenizer(models.BPE())
        pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        made.train_from_iterator(TRAINING_TEXT, trainer)
        made.add_special_tokens(SPECIAL)
        return made
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=["<unk>", "<s>", "</s>", *bytes_of], show_progress=False
    )
    made.train_from_iterator(TRAINING_TEXT, trainer)
    if kind == "legacy":
        made.pre_tokenizer = None
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    described = json.loads(made.to_str())  # bytes are ordinary pieces
    described["added_tokens"] = [each for each in described["added_tokens"] if each["content"] not in bytes_of]
    made = Tokenizer.from_str(json.dumps(described))
    made.add_special_tokens([name for name in SPECIAL if name not in ("<unk>", "<s>", "</s>")])
    return made


def tokenizer_of(template: str | dict[str, str] | None, kind: str = "byte_level") -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_object(kind),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )
