"""Split of a corpus into training and validation. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwen_cl.config.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEFORE = 8
"""Tokens of context to decode at a cut, as a character may span several tokens."""


def split_documents(
    number_of_documents: int, *, share: float, seed: int, key: str = "data.path"
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the indices of the training and of the validation documents, both ascending.

    Document i gets the i-th 64-bit number of PCG64 seeded with ``seed``, a stream that numpy promises never to change.
    The ``round(share * number_of_documents)`` documents with the smallest numbers validate, at least one. So the split
    depends only on the three arguments, and appending documents does not change the other numbers.

    Raises:
        UserError: no document would be left to train on.
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
    """Return the number of training tokens of the only document, and the UTF-8 bytes of the rest, which validates.

    The rest is ``round(share * len(ids))`` tokens, at least one, or slightly fewer so that no character is split. It
    is evaluated like a separate document: its first token does not attend to the training part.

    Raises:
        UserError: none would be left to train on.
    """
    cut = len(ids) - max(1, round(share * len(ids)))
    if cut < 1:
        raise UserError(
            f"{key} is one document of {len(ids)} token{'s' * (len(ids) != 1)}, and data.validation_fraction ({share}) "
            "leaves none to train on; lower it, or set data.validation_path"
        )
    boundary = cut
    while boundary < min(len(ids) - 1, cut + BEFORE) and _text(ids[boundary : boundary + BEFORE], tokenizer).startswith(
        "\ufffd"
    ):
        boundary += 1
    start = max(0, boundary - BEFORE)
    num_bytes = [len(_text(part, tokenizer).encode()) for part in (ids[start:], ids[start:boundary])]
    return boundary, num_bytes[0] - num_bytes[1]


def _text(ids: npt.NDArray[Any], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))
