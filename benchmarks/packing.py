"""Instruction tuning with conversations packed and one to a row, in one command: ``python benchmarks/packing.py``.

Three sides in turn, each in its own process, on the same rows, whose lengths are log-normal with a mean of about 300
tokens: ours with ``task.packing=true``, ours with one conversation to a row, padded to the longest of its micro batch,
and transformers with PEFT, compiled, with every row padded to the sequence length. On a GPU, LoRA on a Qwen2.5-0.5B of
random weights; on a CPU, the embedded model. Prints a table in Markdown; tokens are the rows' own, without padding. Our
sides train about as many rows in a step, packed or not, so that their losses can be compared.
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
OURS = {"qwen_cl, packed": True, "qwen_cl, one to a row": False}
PEER = "transformers, padded"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", type=existing_device, choices=("cuda", "cpu"), help="default: the GPU if there is one"
    )
    parser.add_argument("--warmup-steps", type=positive, default=8)
    parser.add_argument("--steps", type=positive, default=20, help="that are timed")
    parser.add_argument("--sides", nargs="+", choices=[*OURS, PEER], default=[*OURS, PEER], help="default: all three")
    parser.add_argument("--packed-overrides", nargs="*", default=[], help="of our packed side, as to launch.py")
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
        print(f"LoRA on {machine(device)}; rows of {statistics.mean(sizes):.0f} tokens (mean), to {max(sizes)}\n")
        common = ["model=local", f"model.source='{model}'", f"task.sequence_length={length}", f"task.max_steps={total}"]
        common += [f"task.micro_batch_size={micro}", f"cluster.accelerator={'gpu' if device == 'cuda' else 'cpu'}"]
        in_one = int(length / statistics.mean(sizes))  # about as many rows share a sequence
        sides = {}
        for name, packing in OURS.items():
            if name not in arguments.sides:
                continue
            more = arguments.packed_overrides if packing else [f"task.global_batch_size={16 * in_one}"]
            sides[name] = _ours(base / name.replace(" ", "-"), base / "rows.jsonl", packing, [*common, *more], warmup)
        padded = None
        if PEER in arguments.sides:
            padded = _peer(base, model, sizes, device, length, micro, warmup, arguments.steps)
    print("| side | tokens/s of the rows | times padded to the sequence length | loss before | and after |")
    print("|---|---:|---:|---:|---:|")
    for name, side in sides.items():
        times = f"{side.rate / padded:.2f}" if padded else "-"
        print(f"| {name} | {side.rate:,.0f} | {times} | {side.before:.4f} | {side.after:.4f} |")
    if padded:
        print(f"| {PEER} | {padded:,.0f} | 1.00 | | |")
    return 0


@dataclass(frozen=True, slots=True)
class Side:
    rate: float
    """Tokens of the rows a second."""
    before: float
    after: float
    """Validation loss."""


def _widen_tokenizer(model: Path, size: int) -> None:
    """The demo's has 4,096 ids, and a run refuses a model that was trained with another tokenizer: ids that no text
    becomes stand for the others."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}  # or they are numbered anew
    taken = set(vocabulary.values())
    vocabulary |= {f"<unused {number}>": number for number in range(size) if number not in taken}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": vocabulary["<|endoftext|>"]}))


def _write_rows(path: Path, model: Path, count: int, words: int, longest: int) -> list[int]:
    """Positions of each row, as the run counts them."""
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


def _ours(directory: Path, rows: Path, packing: bool, said: list[str], warmup: int) -> Side:
    print(f"{directory.name} …", file=sys.stderr, flush=True)
    command = [sys.executable, str(ROOT / "launch.py"), f"hydra.run.dir='{directory}'", "task=finetune"]
    command += ["data=jsonl", f"data.path='{rows}'", "retention=none", "model.verify=none", "wandb.mode=disabled"]
    command += [f"task.packing={str(packing).lower()}", "task.loss_on=all", "task.global_batch_size=16"]
    command += ["peft=lora", "peft.rank=32", "peft.alpha=32", "peft.dropout=0", "task.sample_prompts=0"]
    command += ["task.val_check_interval=1000", "task.checkpoint_interval=1000", "task.log_interval=1"]
    command += ["task.warmup_steps=0", *said]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        log = directory / "run.log"
        raise SystemExit((log.read_text(errors="replace")[-5000:] if log.exists() else "") + done.stderr[-3000:])
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "train/loss" in line][warmup - 1 :]
    rate = (steps[-1]["tokens"] - steps[0]["tokens"]) / (steps[-1]["time"] - steps[0]["time"])
    losses = [line["val/target/loss"] for line in lines if "val/target/loss" in line]
    return Side(rate, losses[0], losses[-1])


def _peer(
    base: Path, model: Path, sizes: list[int], device: str, length: int, micro: int, warmup: int, timed: int
) -> float:
    """Each row in a sequence of its own; what a row is made of changes no time, so its ids are random."""
    import numpy as np

    print(f"{PEER} …", file=sys.stderr, flush=True)
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
    (base / "peer.json").write_text(json.dumps(specification))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "benchmarks.peers", str(base / "peer.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return sum(sizes[16 * warmup : 16 * (warmup + timed)]) / sum(seconds)


if __name__ == "__main__":
    sys.exit(main())
