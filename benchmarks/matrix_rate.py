"""Operations a second that products of two matrices reach: ``python -m benchmarks.matrix_rate cuda|cpu``."""

from __future__ import annotations

import statistics
import sys

from benchmarks.peers import between, mark

SIZES = {"cuda": 8192, "cpu": 1024}
REPEATS, WARM = 50, 10


def main(device: str) -> None:
    """In bf16 on a GPU, in fp32 on a CPU, as training there; of the median product."""
    import torch

    size = SIZES[device]
    one, other = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    ends = []
    for _ in range(WARM + REPEATS):
        one @ other
        ends.append(mark(device))
    print(2 * size**3 / statistics.median(between(ends[WARM - 1 :], device)))


if __name__ == "__main__":
    main(sys.argv[1])
