"""The table of what ``throughput.py`` measured, in Markdown."""

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
"""Of every side's LoRA, on all of a layer's matrices."""


def table(results: dict[str, Any]) -> str:
    """Of the median, with the tenth and ninetieth percentile, over all timed steps of a side's visits. Seconds to the
    end of the first step are those of its first visit and of its last, which finds what was compiled."""
    lines = [
        f"{results['model']}; {results['machine']}; rows of {results['sequence_length']} tokens, "
        f"{results['global_batch_size']} a step; {results['date']}; `{results['command']}`; "
        + ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        "",
        "| training | micro batch | side | tokens/s (p10-p90) | times best peer | MFU | of products | peak GiB "
        "| first step | GPU busy |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    groups = dict.fromkeys((visit["training"], visit["micro_batch"]) for visit in results["visits"])
    for training, micro in groups:
        visits = [v for v in results["visits"] if (v["training"], v["micro_batch"]) == (training, micro)]
        sides = {name: [v for v in visits if v["side"] == name] for name in dict.fromkeys(v["side"] for v in visits)}
        rates = {name: _rates(results, own) for name, own in sides.items() if not any("error" in v for v in own)}
        peers = [statistics.median(rate) for name, rate in rates.items() if name != OURS]
        for name, own in sides.items():
            cells = _cells(results, training, own, rates.get(name), max(peers, default=None))
            lines.append(f"| {training} | {micro} | {name} | {cells} |")
    lines += ["", _losses(results)]
    if "matrix_flops" in results:
        lines.append(
            f"Of products: of {results['matrix_flops'] / 1e12:,.2f} TFLOP/s, which products of two matrices reach"
        )
    return "\n".join(lines)


def _rates(results: dict[str, Any], visits: list[dict[str, Any]]) -> list[float]:
    tokens = results["sequence_length"] * results["global_batch_size"]
    return sorted(tokens / seconds for visit in visits for seconds in visit["seconds"])


def _cells(
    results: dict[str, Any],
    training: str,
    visits: list[dict[str, Any]],
    rate: list[float] | None,
    best: float | None,
) -> str:
    if rate is None:
        return f"{next(visit['error'] for visit in visits if 'error' in visit)} | | | | | |"
    median = statistics.median(rate)
    low, high = rate[len(rate) // 10], rate[-1 - len(rate) // 10]
    peak = max(visit["peak"] for visit in visits)
    first = " / ".join(dict.fromkeys(f"{visit['first_step']:.0f} s" for visit in (visits[0], visits[-1])))
    flops = median * _flops_per_token(results, training)
    peak_rates = (peak_flops(results["machine"]), results.get("matrix_flops"))
    busy = [visit["busy"] for visit in visits if visit["busy"] is not None]
    return " | ".join([
        f"{median:,.0f} ({low:,.0f}-{high:,.0f})",
        f"{median / best:.2f}" if best else "-",
        *(f"{flops / each:.0%}" if each else "-" for each in peak_rates),
        f"{peak / 2**30:.1f}" if peak else "-",
        first,
        f"{statistics.mean(busy):.0%}" if busy else "-",
    ])  # fmt: skip


def _flops_per_token(results: dict[str, Any], training: str) -> float:
    """Of any side: what the training needs, whatever is done."""
    shape = results["model"].partition(",")[0].removeprefix("Qwen2.5-").lower()
    config = SHAPES.get(shape) or json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    architecture = read_architecture(config, DEMO)
    lora = LoraConfig(default_lr=0.0, rank=RANK, alpha=RANK, dropout=0.0, target_modules=list(TARGET_MODULES))
    flops = training_flops(architecture, adapter_parameters(lora, architecture) if training == "lora" else None)
    return flops.of(1, 0) + flops.per_pair * (results["sequence_length"] + 1) / 2


def _losses(results: dict[str, Any]) -> str:
    """That all sides begin with the same model on the same tokens, and how far apart they come: random adapters
    are not the same."""
    found = []
    for training in dict.fromkeys(visit["training"] for visit in results["visits"]):
        curves = [v["losses"] for v in results["visits"] if v["training"] == training and "error" not in v]
        spreads = [max(losses) - min(losses) for losses in zip(*curves)]
        if spreads:
            verdict = "agree" if spreads[0] < 1e-2 else "DO NOT AGREE"
            found.append(
                f"{training}: losses of all sides {verdict} at step 1 ({spreads[0]:.4f} apart) "
                f"and are at most {max(spreads):.4f} apart in {len(spreads)} steps"
                + (", with other random adapters" if training == "lora" else "")
            )
    return "; ".join(found)
