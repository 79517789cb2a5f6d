"""What the command lines of the benchmarks share: devices, and what they refuse before anything is measured."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, 1 or more")
    return int(text)


def existing_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def existing_device(text: str) -> str:
    if text == "cuda" and default_device() != "cuda":
        raise argparse.ArgumentTypeError("cuda: there is no GPU here; cpu shows the same with the embedded model")
    return text


def default_device() -> str:
    from qwen_cl.planning.devices import visible_gpus

    return "cuda" if visible_gpus() else "cpu"


def machine(device: str) -> str:
    from qwen_cl.planning.devices import visible_gpus

    cpus = f"{len(os.sched_getaffinity(0))} CPU cores"
    return f"{visible_gpus()[0].name}, {cpus}" if device == "cuda" else f"a CPU, {cpus}"
