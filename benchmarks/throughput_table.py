"""The Markdown table of the results of ``throughput.py``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.load import SHAPES
from qwen_cl.config.peft import TARGET_MODULES, LoraConfig
from qwen_cl.models.adapter_methods import adapter_parameters
from qwen_cl.models.architecture import read_architecture
from qwen_cl.planning.flops import peak_flops, training_flops

DEMO = Path(__file__).resolve().parents[1] / "qwen_cl/demo/model"
OURS = "qwen_cl"
RANK = 32
"""LoRA rank in every framework, on all linear layers."""


def table(results: dict[str, Any]) -> str:
    """Return the table: the median, 10th and 90th percentile over all timed steps of a framework's runs.

    The first step is timed in a framework's first run and in its last, which finds compiled code in the cache.
    """
    lines = [
        f"{results['model']}; {results['machine']}; sequences of {results['sequence_length']} tokens, "
        f"{results['global_batch_size']} per step; {results['date']}; `{results['command']}`; "
        + ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        "",
        "| training | micro batch | framework | tokens/s (p10-p90) | speedup over the best other framework | MFU "
        "| share of measured matmul peak | peak GiB | first step | GPU busy |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
    for run in results["runs"]:
        groups.setdefault((run["training"], run["micro_batch"]), {}).setdefault(run["framework"], []).append(run)
    for (training, micro), frameworks in groups.items():
        rates = {
            name: _rates(results, runs) for name, runs in frameworks.items() if not any("error" in run for run in runs)
        }
        baselines = [statistics.median(rate) for name, rate in rates.items() if name != OURS]
        for name, runs in frameworks.items():
            cells = _cells(results, training, runs, rates.get(name), max(baselines, default=None))
            lines.append(f"| {training} | {micro} | {name} | {cells} |")
    lines += ["", _losses(results)]
    if "matrix_flops" in results:
        lines.append(f"Measured matmul peak: {results['matrix_flops'] / 1e12:,.2f} TFLOP/s")
    return "\n".join(lines)


def _rates(results: dict[str, Any], runs: list[dict[str, Any]]) -> list[float]:
    tokens = results["sequence_length"] * results["global_batch_size"]
    return sorted(tokens / seconds for run in runs for seconds in run["seconds"])


def _cells(
    results: dict[str, Any],
    training: str,
    runs: list[dict[str, Any]],
    rate: list[float] | None,
    best: float | None,
) -> str:
    if rate is None:
        return f"{next(run['error'] for run in runs if 'error' in run)} | | | | | |"
    median = statistics.median(rate)
    low, high = rate[len(rate) // 10], rate[-1 - len(rate) // 10]
    peak = max(run["peak"] for run in runs)
    first = " / ".join(dict.fromkeys(f"{run['first_step']:.0f} s" for run in (runs[0], runs[-1])))
    flops = median * _flops_per_token(results, training)
    peak_rates = (peak_flops(results["machine"]), results.get("matrix_flops"))
    busy = [run["busy"] for run in runs if run["busy"] is not None]
    return " | ".join([
        f"{median:,.0f} ({low:,.0f}-{high:,.0f})",
        f"{median / best:.2f}" if best else "-",
        *(f"{flops / each:.0%}" if each else "-" for each in peak_rates),
        f"{peak / 2**30:.1f}" if peak else "-",
        first,
        f"{statistics.mean(busy):.0%}" if busy else "-",
    ])  # fmt: skip


def _flops_per_token(results: dict[str, Any], training: str) -> float:
    """Return the FLOPs per token that the training needs, the same for every framework."""
    shape = results["model"].partition(",")[0].removeprefix("Qwen2.5-").lower()
    config = SHAPES.get(shape) or json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    architecture = read_architecture(config, DEMO)
    lora = LoraConfig(default_lr=0.0, rank=RANK, alpha=RANK, dropout=0.0, target_modules=list(TARGET_MODULES))
    flops = training_flops(architecture, adapter_parameters(lora, architecture) if training == "lora" else None)
    return flops.of(1, 0) + flops.per_pair * (results["sequence_length"] + 1) / 2


def _losses(results: dict[str, Any]) -> str:
    """Compare the losses of all frameworks: at step 1, which shows that model and tokens are the same, and over all
    steps, where randomly initialized adapters differ."""
    found = []
    for training in dict.fromkeys(run["training"] for run in results["runs"]):
        curves = [run["losses"] for run in results["runs"] if run["training"] == training and "error" not in run]
        spreads = [max(losses) - min(losses) for losses in zip(*curves)]
        if spreads:
            verdict = "agree" if spreads[0] < 1e-2 else "DO NOT AGREE"
            found.append(
                f"{training}: losses of all frameworks {verdict} at step 1 (difference {spreads[0]:.4f}); "
                f"max loss difference over {len(spreads)} steps {max(spreads):.4f}"
                + (", with differently initialized adapters" if training == "lora" else "")
            )
    return "; ".join(found)
