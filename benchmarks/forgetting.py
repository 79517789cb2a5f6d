"""What learning a language costs the old one: full fine-tuning with and without replay, and LoRA, several seeds each.

``python benchmarks/forgetting.py TEXTS [--steps N] [--seeds N] [--parallel N] [--output FILE]``, with TEXTS as
``python -m benchmarks.texts`` wrote it. Starts from the embedded model, which has read English; trains on Japanese;
measures both on held-out documents. Every arm sees as many tokens. Prints a table in Markdown, and below it what LoRA
gives and takes beside full fine-tuning: perplexity reached, parameters, memory, time.
"""

from __future__ import annotations

import argparse
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
ARMS = {
    FULL: ["peft=none", "lr=1e-3"],
    **{f"full, {share} % replay": ["peft=none", "lr=1e-3", f"replay.share={share / 100}"] for share in (1, 5, 25)},
    LORA: ["peft=lora", "peft.rank=64", "peft.alpha=128", "lr=2e-3"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time; times are then not those of one alone")
    parser.add_argument("--micro-batch-size", type=int, default=64)
    parser.add_argument("--output", type=Path, help="JSON of every run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forgetting-") as temporary:
        replay = _replay_file(arguments.texts, Path(temporary))
        runs = [(arm, seed) for seed in range(arguments.seeds) for arm in ARMS]
        with ThreadPoolExecutor(arguments.parallel) as pool:
            started = [pool.submit(_run, arm, seed, arguments, replay, Path(temporary)) for arm, seed in runs]
            done = [run.result() for run in started]
    by_arm: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for record in done:
        by_arm[record["arm"]].append(record)
    _print_table(by_arm)
    _print_lora(by_arm[FULL], by_arm[LORA])
    if arguments.output:
        arguments.output.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
    return 0


def _replay_file(texts: Path, directory: Path) -> Path:
    """Documents spread evenly over all of the English text."""
    lines = (texts / "english.train.jsonl").read_text(encoding="utf-8").splitlines()
    path = directory / "replay.jsonl"
    path.write_text("\n".join(lines[:: max(1, len(lines) // REPLAY_DOCUMENTS)]) + "\n", encoding="utf-8")
    return path


def _run(arm: str, seed: int, arguments: Any, replay: Path, temporary: Path) -> dict[str, Any]:
    texts: Path = arguments.texts.absolute()
    folder = temporary / f"{list(ARMS).index(arm)}-{seed}"
    said = [
        *("task=pretrain", "model=tiny", "data=text", "data.allow_overlap=true", "wandb.mode=disabled"),
        f"data.path='{texts / 'japanese.train.jsonl'}'",
        f"data.validation_path='{texts / 'japanese.validation.jsonl'}'",
        *("retention=files", f"retention.sets={{english: '{texts / 'english.validation.jsonl'}'}}"),
        *(
            "task.sequence_length=512",
            "task.global_batch_size=64",
            f"task.micro_batch_size={arguments.micro_batch_size}",
        ),
        *(f"task.max_steps={arguments.steps}", f"task.warmup_steps={max(1, arguments.steps // 20)}"),
        *(f"task.val_check_interval={arguments.steps}", f"task.checkpoint_interval={arguments.steps}"),
        *("task.log_interval=10", f"seed={1234 + seed}", *ARMS[arm]),
    ]
    if any(word.startswith("replay.share") for word in said):
        said += ["replay=files", f"replay.sets={{english: '{replay}'}}"]
    print(f"{arm}, seed {seed} …", file=sys.stderr, flush=True)
    command = [sys.executable, str(ROOT / "launch.py"), f"hydra.run.dir='{folder}'", *said]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if ended.returncode:
        log = folder / "run.log"
        raise SystemExit(ended.stderr + (log.read_text(encoding="utf-8")[-3000:] if log.exists() else ""))
    return {"arm": arm, "seed": seed, **_figures(folder)}


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


def _print_table(by_arm: dict[str, list[dict[str, Any]]]) -> None:
    some = next(iter(by_arm.values()))
    before = [statistics.mean(record[name][0] for record in some) for name in ("japanese", "english")]
    print(f"\nBits per byte, {len(some)} seeds: mean (standard deviation). Before: {before[0]:.3f}, {before[1]:.3f}.\n")
    print("| | Japanese | English | English rose by |\n|---|---:|---:|---:|")
    for arm, records in by_arm.items():
        japanese, english = ([record[name][1] for record in records] for name in ("japanese", "english"))
        rise = [record["english"][1] - record["english"][0] for record in records]
        print(f"| {arm} | {_spread(japanese)} | {_spread(english)} | {_spread(rise, '+')} |")


def _print_lora(full: list[dict[str, Any]], lora: list[dict[str, Any]]) -> None:
    def mean(records: list[dict[str, Any]], name: str) -> float:
        return statistics.mean(record[name] for record in records)

    perplexity = [math.exp(mean(records, "japanese_loss")) for records in (full, lora)]
    whole = full[0]["parameters"]
    print(
        f"\nLoRA beside full fine-tuning: perplexity {perplexity[1]:.1f} and {perplexity[0]:.1f} "
        f"({perplexity[0] / perplexity[1]:.1%} of it reached), {lora[0]['parameters'] / whole:.2%} of the parameters, "
        f"{1 - mean(lora, 'memory_gib') / mean(full, 'memory_gib'):.0%} less memory, "
        f"{1 - mean(full, 'tokens_per_second') / mean(lora, 'tokens_per_second'):.0%} less time a token"
    )


def _spread(values: list[float], sign: str = "") -> str:
    deviation = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
