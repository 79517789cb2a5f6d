"""Compare instruction tuning with and without sequence packing: ``python benchmarks/packing.py``.

Three runs in turn, each in its own process, on the same examples, whose lengths are log-normal with a mean of about 300
tokens: qwen_cl with ``task.packing=true``; qwen_cl with one conversation per sequence, padded to the longest of its
micro batch; and transformers with PEFT, compiled, with every example padded to the sequence length. On a GPU, LoRA on
Qwen2.5-0.5B with random weights; on a CPU, the bundled demo model. Prints a Markdown table; padding is not counted in
tokens/s. Both qwen_cl runs train on about as many examples per step, so that their losses can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.arguments import default_device, existing_device, machine, positive  # noqa: E402

MEDIAN_WORDS, SPREAD, SEED = 115, 0.85, 7
OURS = {"qwen_cl, packed": True, "qwen_cl, not packed": False}
BASELINE = "transformers, padded"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", type=existing_device, choices=("cuda", "cpu"), help="default: the GPU if there is one"
    )
    parser.add_argument("--warmup-steps", type=positive, default=8)
    parser.add_argument("--steps", type=positive, default=20, help="timed steps")
    frameworks = [*OURS, BASELINE]
    parser.add_argument("--frameworks", nargs="+", choices=frameworks, default=frameworks, help="default: all three")
    parser.add_argument("--packed-overrides", nargs="*", default=[], help="overrides of the packed qwen_cl run")
    arguments = parser.parse_args()
    from benchmarks.load import SHAPES, write_model

    device = arguments.device or default_device()
    length, micro = (2048, 4) if device == "cuda" else (256, 2)
    warmup, total = arguments.warmup_steps, arguments.warmup_steps + arguments.steps
    with tempfile.TemporaryDirectory(prefix="packing-") as temporary:
        base = Path(temporary)
        model = base / "model" if device == "cuda" else ROOT / "qwen_cl/demo/model"
        if device == "cuda":
            write_model(model, SHAPES["0.5b"])
            _widen_tokenizer(model, SHAPES["0.5b"]["vocab_size"])
        scale = MEDIAN_WORDS if device == "cuda" else MEDIAN_WORDS // 8
        sizes = _write_rows(base / "rows.jsonl", model, total * 16 * 8, scale, length)
        mean = statistics.mean(sizes)
        print(f"LoRA on {machine(device)}; examples of {mean:.0f} tokens on average, at most {max(sizes)}\n")
        common = ["model=local", f"model.source='{model}'", f"task.sequence_length={length}", f"task.max_steps={total}"]
        common += [f"task.micro_batch_size={micro}", f"cluster.accelerator={'gpu' if device == 'cuda' else 'cpu'}"]
        per_sequence = int(length / mean)  # about as many examples share a packed sequence
        results = {}
        for name, packing in OURS.items():
            if name not in arguments.frameworks:
                continue
            more = arguments.packed_overrides if packing else [f"task.global_batch_size={16 * per_sequence}"]
            results[name] = _ours(base / name.replace(" ", "-"), base / "rows.jsonl", packing, [*common, *more], warmup)
        padded = None
        if BASELINE in arguments.frameworks:
            padded = _baseline(base, model, sizes, device, length, micro, warmup, arguments.steps)
    print("| framework | tokens/s | speedup over padding to the sequence length | loss before | loss after |")
    print("|---|---:|---:|---:|---:|")
    for name, result in results.items():
        speedup = f"{result.rate / padded:.2f}" if padded else "-"
        print(f"| {name} | {result.rate:,.0f} | {speedup} | {result.before:.4f} | {result.after:.4f} |")
    if padded:
        print(f"| {BASELINE} | {padded:,.0f} | 1.00 | | |")
    return 0


@dataclass(frozen=True, slots=True)
class Result:
    rate: float
    """Tokens per second, without padding."""
    before: float
    """Validation loss at step 0."""
    after: float
    """Validation loss at the end."""


def _widen_tokenizer(model: Path, size: int) -> None:
    """Add unused ids to the demo model's tokenizer of 4,096 ids up to the size of the model's vocabulary, since a run
    refuses a model whose tokenizer does not match."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {
        token["content"]: token["id"] for token in tokenizer["added_tokens"]
    }  # otherwise they would get new ids
    taken = set(vocabulary.values())
    vocabulary |= {f"<unused {number}>": number for number in range(size) if number not in taken}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": vocabulary["<|endoftext|>"]}))


def _write_rows(path: Path, model: Path, count: int, words: int, longest: int) -> list[int]:
    """Write the examples and return the number of positions of each, as the run counts them."""
    import numpy as np

    from qwen_cl.config.task.training import LossOn
    from qwen_cl.data.examples import build_examples, load_data_tokenizer
    from qwen_cl.data.rows import RowFiles, read_rows

    random = np.random.default_rng(SEED)
    lengths = np.clip(random.lognormal(np.log(words), SPREAD, count), 4, longest // 4).astype(int)
    vocabulary = np.array([f"{first}{last}" for first in "bdfgklmnprst" for last in ("al", "en", "ir", "o", "ut")])
    with path.open("w", encoding="utf-8") as stream:
        for size in lengths:
            text = " ".join(random.choice(vocabulary, size))
            cut = len(text) // 3
            stream.write(json.dumps({"prompt": text[:cut], "completion": text[cut:]}) + "\n")
    tokenizer = load_data_tokenizer(str(model))
    rows, _ = read_rows(
        RowFiles(train=str(path), validation=None, validation_every=len(lengths), raw_text=False, fields={})
    )
    return [example.num_positions for example in build_examples(rows, tokenizer, longest, LossOn.all)]


def _ours(directory: Path, rows: Path, packing: bool, overrides: list[str], warmup: int) -> Result:
    print(f"{directory.name} …", file=sys.stderr, flush=True)
    command = [sys.executable, str(ROOT / "launch.py"), f"hydra.run.dir='{directory}'", "task=finetune"]
    command += ["data=jsonl", f"data.path='{rows}'", "retention=none", "model.verify=none", "wandb.mode=disabled"]
    command += [f"task.packing={str(packing).lower()}", "task.loss_on=all", "task.global_batch_size=16"]
    command += ["peft=lora", "peft.rank=32", "peft.alpha=32", "peft.dropout=0", "task.sample_prompts=0"]
    command += ["task.val_check_interval=1000", "task.checkpoint_interval=1000", "task.log_interval=1"]
    command += ["task.warmup_steps=0", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        log = directory / "run.log"
        raise SystemExit((log.read_text(errors="replace")[-5000:] if log.exists() else "") + done.stderr[-3000:])
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "train/loss" in line][warmup - 1 :]
    rate = (steps[-1]["tokens"] - steps[0]["tokens"]) / (steps[-1]["time"] - steps[0]["time"])
    losses = [line["val/target/loss"] for line in lines if "val/target/loss" in line]
    return Result(rate, losses[0], losses[-1])


def _baseline(
    base: Path, model: Path, sizes: list[int], device: str, length: int, micro: int, warmup: int, timed: int
) -> float:
    """Return the tokens/s with one example per padded sequence. The ids are random, as they do not affect speed."""
    import numpy as np

    print(f"{BASELINE} …", file=sys.stderr, flush=True)
    random, count = np.random.default_rng(SEED), 16 * (warmup + timed)
    tokens = random.integers(0, 1000, (count, length + 1))
    for row, size in zip(tokens, sizes):
        row[size + 1 :] = -1
    np.save(base / "padded.npy", tokens)
    specification: dict[str, Any] = {
        "device": device,
        "sequence_length": length,
        "global_batch_size": 16,
        "micro_batch_size": micro,
        "warmup_steps": warmup,
        "timed_steps": timed,
        "lr": 1e-4,
        "training": "lora",
        "compiled": device == "cuda",
        "liger": False,
        "model": str(model),
        "tokens": str(base / "padded.npy"),
        "started": time.time(),
    }
    (base / "baseline.json").write_text(json.dumps(specification))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "benchmarks.baselines", str(base / "baseline.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return sum(sizes[16 * warmup : 16 * (warmup + timed)]) / sum(seconds)


if __name__ == "__main__":
    sys.exit(main())
