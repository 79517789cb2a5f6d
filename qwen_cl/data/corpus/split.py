"""Which documents validate. No torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qwen_cl.config.errors import UserError


def held_out(
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
            f"{key} has {number_of_documents} document{'s' * (number_of_documents != 1)}, and data.validation_share "
            f"({share}) leaves none to train on; lower it, or set data.validation_path"
        )
    numbers = np.random.PCG64(seed).random_raw(number_of_documents)
    chosen = np.zeros(number_of_documents, dtype=bool)
    chosen[np.argsort(numbers, kind="stable")[:count]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
