"""Fingerprints of texts for overlap detection: a hash of the text, and hashes of its 13-grams. No torch.

Rows are normalized, and their whitespace-only tokens dropped. A corpus is compared by its token ids, without
whitespace-only tokens; texts compared with a corpus must be fingerprinted the same way.
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
"""Consecutive tokens that two texts do not share by chance (arXiv 2005.14165, appendix C)."""
CHUNK = 1000

Hashes = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.integer[Any]]
Encode = Callable[[list[str]], list[list[int]]]
"""Returns the token ids of each text, without special tokens and whitespace-only tokens."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The hashes by which a text is compared with others."""

    key: bytes
    """Hash of the complete text; empty if there is nothing to compare."""
    grams: Hashes
    """Hashes of its 13-grams: distinct, ascending."""


Fingerprints = Callable[[Iterable[str]], Iterator[Fingerprint]]


def row_fingerprints(texts: Iterable[str], encode: Encode) -> Iterator[Fingerprint]:
    """Yield the fingerprints of rows' texts, lazily in chunks."""
    normalized = map(normalize, texts)
    while chunk := list(itertools.islice(normalized, CHUNK)):
        for text, ids in zip(chunk, encode(chunk)):
            yield Fingerprint(text_key(text), gram_hashes(ids))


def row_fingerprinter(tokenizer: PreTrainedTokenizerBase) -> Fingerprints:
    return functools.partial(row_fingerprints, encode=content_encoder(tokenizer))


def token_fingerprints(documents: Iterable[Ids], tokenizer: PreTrainedTokenizerBase) -> Iterator[Fingerprint]:
    """Yield the fingerprints of a corpus's documents, given without BOS and end-of-text."""
    is_blank = _blank_tokens(tokenizer)
    for ids in documents:
        content = ids[~is_blank[np.minimum(ids, len(is_blank) - 1)]]
        key = hashlib.sha256(content.astype("<i8").tobytes()).digest()[:16] if len(content) else b""
        yield Fingerprint(key, gram_hashes(content))


def corpus_fingerprinter(tokenizer: PreTrainedTokenizerBase) -> Fingerprints:
    """Return a function that fingerprints texts as ``token_fingerprints`` does the documents of a corpus."""

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
    """Return the distinct 64-bit hashes of all 13-grams, ascending; two grams collide less than once in 10^13."""
    tokens = np.asarray(ids).astype(np.uint64)
    count = len(tokens) - GRAM + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for offset, factor in enumerate(_FACTORS):  # no window of 13 columns, so that a long document fits in memory
        hashes += tokens[offset : offset + count] * factor
    return np.unique(hashes)


_FACTORS = np.random.default_rng(13).integers(0, 2**63, size=GRAM, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def _blank_tokens(tokenizer: PreTrainedTokenizerBase) -> npt.NDArray[np.bool_]:
    """Return for each id if it is whitespace only; a last entry serves ids beyond the tokenizer's vocabulary."""
    texts = tokenizer.batch_decode([[number] for number in range(len(tokenizer))])
    return np.array([*(not text.strip() for text in texts), False])
