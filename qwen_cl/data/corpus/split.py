"""Which documents validate, or how much of the only one. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwen_cl.config.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEFORE = 8
"""Tokens before a cut that tell what text the first after it stands for: some characters and spaces are in several."""


def split_documents(
    number_of_documents: int, *, share: float, seed: int, key: str = "data.path"
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of the documents that train and of those that validate, both ascending.

    The rule: the documents' numbers are drawn in order, document i the i-th 64-bit number of PCG64 seeded with
    ``seed``, a stream that numpy promises never to change. The ``round(share * number_of_documents)`` documents with
    the smallest numbers validate, at least one. So the split depends on nothing but the three arguments, and adding
    documents at the end changes no other document's number.

    Raises:
        UserError: none would be left to train on.
    """
    count = max(1, round(share * number_of_documents))
    if count >= number_of_documents:
        raise UserError(
            f"{key} has {number_of_documents} document{'s' * (number_of_documents != 1)}, and data.validation_fraction "
            f"({share}) leaves none to train on; lower it, or set data.validation_path"
        )
    numbers = np.random.PCG64(seed).random_raw(number_of_documents)
    chosen = np.zeros(number_of_documents, dtype=bool)
    chosen[np.argsort(numbers, kind="stable")[:count]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def cut_document(ids: npt.NDArray[Any], tokenizer: PreTrainedTokenizerBase, share: float, key: str) -> tuple[int, int]:
    """How many tokens of the only document train, and the UTF-8 bytes of the rest, which validates.

    The rest is ``round(share * len(ids))`` tokens, at least one, or some fewer so that no character is cut in two. It
    is measured like a document of its own: its first token sees none of those that train.

    Raises:
        UserError: none would be left to train on.
    """
    cut = len(ids) - max(1, round(share * len(ids)))
    if cut < 1:
        raise UserError(
            f"{key} is one document of {len(ids)} token{'s' * (len(ids) != 1)}, and data.validation_fraction ({share}) "
            "leaves none to train on; lower it, or set data.validation_path"
        )
    whole = cut
    while whole < min(len(ids) - 1, cut + BEFORE) and _text(ids[whole : whole + BEFORE], tokenizer).startswith(
        "\ufffd"
    ):
        whole += 1
    start = max(0, whole - BEFORE)
    num_bytes = [len(_text(part, tokenizer).encode()) for part in (ids[start:], ids[start:whole])]
    return whole, num_bytes[0] - num_bytes[1]


def _text(ids: npt.NDArray[Any], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))
