"""What stands for a text where texts are compared: the whole of it, and its pieces. No torch.

Rows are compared by what they say: normalized, and without tokens that are whitespace alone. A corpus is compared as
it is tokenized, without the latter too; whatever is compared with it must be read the same way.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwen_cl.data.normalize import normalize, text_key
from qwen_cl.data.raw_text import encode_text, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GRAM = 13
"""Tokens in a row that two texts do not share by chance (arXiv 2005.14165, appendix C)."""
CHUNK = 1000

Hashes = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.integer[Any]]
Encode = Callable[[list[str]], list[list[int]]]
"""Token ids of each text, without special tokens and without tokens that are whitespace alone."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    key: bytes
    """Stands for the whole text; empty where there is nothing to compare."""
    grams: Hashes
    """Of its 13-token pieces: distinct, in rising order."""


Fingerprints = Callable[[Iterable[str]], Iterator[Fingerprint]]


def row_fingerprints(texts: Iterable[str], encode: Encode) -> Iterator[Fingerprint]:
    """Lazily, some texts at a time."""
    normalized = map(normalize, texts)
    while chunk := list(itertools.islice(normalized, CHUNK)):
        for text, ids in zip(chunk, encode(chunk)):
            yield Fingerprint(text_key(text), gram_hashes(ids))


def row_fingerprinter(tokenizer: PreTrainedTokenizerBase) -> Fingerprints:
    return functools.partial(row_fingerprints, encode=content_encoder(tokenizer))


def token_fingerprints(documents: Iterable[Ids], tokenizer: PreTrainedTokenizerBase) -> Iterator[Fingerprint]:
    """Of documents of a corpus, without their BOS and end-of-text."""
    is_blank = _blank_tokens(tokenizer)
    for ids in documents:
        kept = ids[~is_blank[np.minimum(ids, len(is_blank) - 1)]]
        key = hashlib.sha256(kept.astype("<i8").tobytes()).digest()[:16] if len(kept) else b""
        yield Fingerprint(key, gram_hashes(kept))


def corpus_fingerprinter(tokenizer: PreTrainedTokenizerBase) -> Fingerprints:
    """Of texts, as ``token_fingerprints`` has them once they are tokenized for a corpus."""

    def fingerprints(texts: Iterable[str]) -> Iterator[Fingerprint]:
        encoded = (np.array(encode_text(tokenizer, text), np.int64) for text in texts)
        return token_fingerprints(encoded, tokenizer)

    return fingerprints


def content_encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    blank: dict[int, bool] = {}

    def is_blank(token: int) -> bool:
        if token not in blank:
            blank[token] = not tokenizer.decode([token]).strip()
        return blank[token]

    def encode(texts: list[str]) -> list[list[int]]:
        return [[token for token in ids if not is_blank(token)] for ids in encode_texts(tokenizer, texts)]

    return encode


def gram_hashes(ids: npt.ArrayLike) -> Hashes:
    """64 bits stand for a gram: two different ones meet less often than once in 10^13."""
    tokens = np.asarray(ids).astype(np.uint64)
    count = len(tokens) - GRAM + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for offset, factor in enumerate(_FACTORS):  # rather than a window of 13 columns: a long document fits in memory
        hashes += tokens[offset : offset + count] * factor
    return np.unique(hashes)


_FACTORS = np.random.default_rng(13).integers(0, 2**63, size=GRAM, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def _blank_tokens(tokenizer: PreTrainedTokenizerBase) -> npt.NDArray[np.bool_]:
    """By id; one more at the end, for the ids that a model has and its tokenizer does not."""
    texts = tokenizer.batch_decode([[number] for number in range(len(tokenizer))])
    return np.array([*(not text.strip() for text in texts), False])
