"""Measure the peak FLOP/s of a matmul: ``python -m benchmarks.matrix_rate cuda|cpu``."""

from __future__ import annotations

import statistics
import sys

from benchmarks.baselines import between, mark

SIZES = {"cuda": 8192, "cpu": 1024}
REPEATS, WARMUP = 50, 10


def main(device: str) -> None:
    """Print the FLOP/s of the median matmul, in the dtype that training uses: bf16 on a GPU, fp32 on a CPU."""
    import torch

    size = SIZES[device]
    one, other = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    ends = []
    for _ in range(WARMUP + REPEATS):
        one @ other
        ends.append(mark(device))
    print(2 * size**3 / statistics.median(between(ends[WARMUP - 1 :], device)))


if __name__ == "__main__":
    main(sys.argv[1])
