"""Command-line arguments that the benchmarks share, and their validation."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a positive integer")
    return int(text)


def existing_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return Path(text)


def existing_device(text: str) -> str:
    if text == "cuda" and default_device() != "cuda":
        raise argparse.ArgumentTypeError("cuda: no GPU found; use cpu, which runs the bundled demo model")
    return text


def default_device() -> str:
    from qwen_cl.planning.devices import visible_gpus

    return "cuda" if visible_gpus() else "cpu"


def machine(device: str) -> str:
    from qwen_cl.planning.devices import visible_gpus

    cpus = f"{len(os.sched_getaffinity(0))} CPU cores"
    return f"{visible_gpus()[0].name}, {cpus}" if device == "cuda" else f"a CPU, {cpus}"
