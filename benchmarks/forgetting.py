"""Measure the forgetting of full fine-tuning, with and without replay, and of LoRA, over several seeds.

``python benchmarks/forgetting.py TEXTS [--package NAME] [--steps N] [--seeds N] [--parallel N] [--output FILE]``,
with TEXTS as written by ``python -m benchmarks.texts``. Starts from the bundled demo model, which was trained on
English, trains on Japanese from all packages or from one, and evaluates both on held-out documents. Every method trains
on the same number of tokens. Prints a Markdown table, and LoRA compared with full fine-tuning: perplexity, parameters,
and memory and time of a run of each on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPLAY_DOCUMENTS = 1500
FULL, LORA = "full", "LoRA r64"
# With a higher lr, English is forgotten and Japanese gains little.
_ADAPTER = ["peft=lora", "peft.rank=64", "peft.alpha=128", "lr=5e-4"]
METHODS = {
    FULL: ["peft=full", "lr=1e-3"],
    **{f"full, {share} % replay": ["peft=full", "lr=1e-3", f"replay.ratio={share / 100}"] for share in (1, 5, 25)},
    LORA: _ADAPTER,
    f"{LORA}, 25 % replay": [*_ADAPTER, "replay.ratio=0.25"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument(
        "--package", help="train and validate on the Japanese of this package only, e.g. debian-reference-ja"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=1, help="concurrent runs, after the two that are timed")
    parser.add_argument("--micro-batch-size", type=int, default=64)
    parser.add_argument("--output", type=Path, help="JSON file with the results of every run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forgetting-") as temporary:
        replay = _replay_file(arguments.texts, Path(temporary))
        japanese = japanese_files(arguments.texts, arguments.package, Path(temporary))
        alone = [(FULL, 0), (LORA, 0)]
        runs = [(name, seed) for seed in range(arguments.seeds) for name in METHODS if (name, seed) not in alone]
        done = [_run(name, seed, arguments, replay, japanese, Path(temporary)) for name, seed in alone]
        with ThreadPoolExecutor(arguments.parallel) as pool:
            started = [
                pool.submit(_run, name, seed, arguments, replay, japanese, Path(temporary)) for name, seed in runs
            ]
            done += [run.result() for run in started]
    by_method: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for record in done:
        by_method[record["method"]].append(record)
    _print_table(by_method)
    _print_lora(by_method[FULL], by_method[LORA], *done[:2])
    if arguments.output:
        arguments.output.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
    return 0


def _replay_file(texts: Path, directory: Path) -> Path:
    """Write the replay set: documents spread evenly over the English text."""
    lines = (texts / "english.train.jsonl").read_text(encoding="utf-8").splitlines()
    path = directory / "replay.jsonl"
    path.write_text("\n".join(lines[:: max(1, len(lines) // REPLAY_DOCUMENTS)]) + "\n", encoding="utf-8")
    return path


def japanese_files(texts: Path, package: str | None, directory: Path) -> list[Path]:
    """Return the training and the validation file.

    A single package may be too small to have documents in the usual validation split of one in fifty. For it, a fifth
    of its documents validate, those with the smallest sha256.
    """
    files = [(texts / f"japanese.{part}.jsonl").absolute() for part in ("train", "validation")]
    if package is None:
        return files
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines(keepends=True)]
    packages = [json.loads(line).get("package") for line in lines]
    selected = [line for line, name in zip(lines, packages) if name == package]
    if len(selected) < 2:
        known = ", ".join(sorted(set(filter(None, packages)))) or "none; run python -m benchmarks.texts again"
        raise SystemExit(
            f"{texts}: --package {package} has {len(selected)} documents, at least two are needed; packages: {known}"
        )
    selected.sort(key=lambda line: hashlib.sha256(json.loads(line)["text"].encode()).digest())
    count = max(1, len(selected) // 5)
    chosen = [directory / file.name for file in files]
    for file, part in zip(chosen, (selected[count:], selected[:count])):
        file.write_text("".join(part), encoding="utf-8", newline="\n")
    return chosen


def _run(method: str, seed: int, arguments: Any, replay: Path, japanese: list[Path], temporary: Path) -> dict[str, Any]:
    texts: Path = arguments.texts.absolute()
    folder = temporary / f"{list(METHODS).index(method)}-{seed}"
    overrides = [
        *("task=pretrain", "model=tiny", "data=text", "data.allow_overlap=true", "wandb.mode=disabled"),
        f"data.path='{japanese[0]}'",
        f"data.validation_path='{japanese[1]}'",
        *("retention=files", f"retention.eval_sets={{english: '{texts / 'english.validation.jsonl'}'}}"),
        *(
            "task.sequence_length=512",
            "task.global_batch_size=64",
            f"task.micro_batch_size={arguments.micro_batch_size}",
        ),
        *(f"task.max_steps={arguments.steps}", f"task.warmup_steps={max(1, arguments.steps // 20)}"),
        *(f"task.val_check_interval={arguments.steps}", f"task.checkpoint_interval={arguments.steps}"),
        *("task.log_interval=10", f"seed={1234 + seed}", *METHODS[method]),
    ]
    if any(word.startswith("replay.ratio") for word in overrides):
        overrides += ["replay=files", f"replay.datasets={{english: '{replay}'}}"]
    print(f"{method}, seed {seed} …", file=sys.stderr, flush=True)
    command = [sys.executable, str(ROOT / "launch.py"), f"hydra.run.dir='{folder}'", *overrides]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if ended.returncode:
        log = folder / "run.log"
        raise SystemExit(ended.stderr + (log.read_text(encoding="utf-8")[-3000:] if log.exists() else ""))
    return {"method": method, "seed": seed, **_figures(folder)}


def _figures(folder: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    measured = [record for record in records if "val/target/loss" in record]
    rates = [record["throughput/tokens_per_second"] for record in records if "train/loss" in record]
    first, last = measured[0], measured[-1]
    return {
        "japanese": [first["val/target/bits_per_byte"], last["val/target/bits_per_byte"]],
        "japanese_loss": last["val/target/loss"],
        "english": [first["retention/english/bits_per_byte"], last["retention/english/bits_per_byte"]],
        "english_loss": [first["retention/english/loss"], last["retention/english/loss"]],
        "parameters": status["trainable_parameters"],
        "memory_gib": status["peak_memory_gib"],
        "tokens_per_second": statistics.median(rates),
    }


def _print_table(by_method: dict[str, list[dict[str, Any]]]) -> None:
    some = next(iter(by_method.values()))
    before = [statistics.mean(record[name][0] for record in some) for name in ("japanese", "english")]
    print(f"\nBits per byte, {len(some)} seeds: mean (standard deviation). Before: {before[0]:.3f}, {before[1]:.3f}.\n")
    print("| | Japanese | English | increase in English |\n|---|---:|---:|---:|")
    for method, records in by_method.items():
        japanese, english = ([record[name][1] for record in records] for name in ("japanese", "english"))
        increase = [record["english"][1] - record["english"][0] for record in records]
        print(f"| {method} | {_spread(japanese)} | {_spread(english)} | {_spread(increase, '+')} |")


def _print_lora(
    full: list[dict[str, Any]], lora: list[dict[str, Any]], full_alone: dict[str, Any], lora_alone: dict[str, Any]
) -> None:
    perplexity = [math.exp(statistics.mean(record["japanese_loss"] for record in records)) for records in (full, lora)]
    print(
        f"\nLoRA compared with full fine-tuning: perplexity {perplexity[1]:.1f} and {perplexity[0]:.1f} "
        f"(ratio {perplexity[0] / perplexity[1]:.1%}), "
        f"{lora_alone['parameters'] / full_alone['parameters']:.2%} of the parameters, "
        f"{lora_alone['memory_gib'] / full_alone['memory_gib'] - 1:+.0%} memory, "
        f"{full_alone['tokens_per_second'] / lora_alone['tokens_per_second'] - 1:+.0%} time per token"
    )


def _spread(values: list[float], sign: str = "") -> str:
    deviation = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
