"""Measure each speed optimization alone: ``python benchmarks/speed_optimizations.py [--help]``.

Train on the same sequences from the same weights with no optimization, with each alone, and with all that ``auto``
enables. Each run is a process of its own, started as ``python launch.py`` starts it. Print a Markdown table of speed,
memory, and the largest relative difference of loss and gradient norm from the baseline without optimizations. On a GPU
the model is Qwen2.5-0.5B with random weights in bf16, on a CPU the bundled demo model in fp32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.arguments import default_device, existing_device, existing_file, machine, positive  # noqa: E402

OPTIMIZATIONS = {
    "none": [],
    "compile": ["speed.compile=always"],
    "fused_linear_cross_entropy": ["speed.fused_linear_cross_entropy=always"],
    "fused_lora": ["speed.fused_lora=always"],
    "cuda_graphs": ["speed.cuda_graphs=always"],
    "fused_grad_accumulation": ["speed.fused_grad_accumulation=always"],
    "activation_recompute": ["speed.activation_recompute=always"],
    "rope_cache": ["speed.rope_cache=true"],
    "fused_adam": ["speed.fused_adam=true"],
    "foreach_grad_clip": ["speed.foreach_grad_clip=true"],
}
ALL, SLOWER = "all that auto enables", ("activation_recompute",)
LORA_ONLY, GPU_ONLY = ("fused_lora",), ("cuda_graphs",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", type=existing_device, choices=("cuda", "cpu"), help="default: the GPU if there is one"
    )
    parser.add_argument("--training", choices=("lora", "full"), default="lora")
    parser.add_argument(
        "--optimizations", nargs="+", choices=[*OPTIMIZATIONS, ALL], help="default: all that the device supports"
    )
    parser.add_argument("--warmup-steps", type=positive, default=8)
    parser.add_argument("--steps", type=positive, default=12, help="timed steps")
    parser.add_argument("--output", type=Path, help="also write the results as JSON after each run")
    parser.add_argument("--directory", type=Path, help="parent of the temporary directory")
    parser.add_argument("--table", type=existing_file, help="print the table of a results file and exit")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return 0
    print(table(measure(arguments)))
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import throughput
    from benchmarks.load import SHAPES, write_model
    from benchmarks.throughput_table import OURS
    from qwen_cl.runs.provenance import versions

    on_gpu = (device := arguments.device or default_device()) == "cuda"
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(device),
        "versions": versions(throughput.SHOWN_VERSIONS),
        "training": arguments.training,
        "runs": {},
    }
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="speed-") as temporary:
        base = Path(temporary)
        model = base / "model" if on_gpu else ROOT / "qwen_cl/demo/model"
        if on_gpu:
            write_model(model, SHAPES["0.5b"])
        specification = {
            "device": device,
            "training": arguments.training,
            "model": str(model),
            "lr": throughput.LR,
            "sequence_length": 2048 if on_gpu else 128,
            "global_batch_size": 16 if on_gpu else 8,
            "micro_batch_size": 4 if on_gpu else 2,
            "warmup_steps": arguments.warmup_steps,
            "timed_steps": arguments.steps,
        }
        specification["rows"] = specification["global_batch_size"] * (arguments.warmup_steps + arguments.steps)
        results |= {name: specification[name] for name in ("sequence_length", "global_batch_size", "micro_batch_size")}
        for name, overrides in _chosen(arguments.optimizations, arguments.training, on_gpu).items():
            overrides = ["speed=off", *overrides]
            directory = base / f"run-{len(results['runs'])}"
            results["runs"][name] = throughput._run(OURS, specification, directory, overrides)
            if arguments.output:
                arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _chosen(names: list[str] | None, training: str, on_gpu: bool) -> dict[str, list[str]]:
    supported = {
        name: overrides
        for name, overrides in OPTIMIZATIONS.items()
        if (training == "lora" or name not in LORA_ONLY) and (on_gpu or name not in GPU_ONLY)
    }
    supported[ALL] = [each for name, overrides in supported.items() if name not in SLOWER for each in overrides]
    return supported if names is None else {name: supported[name] for name in supported if name in {"none", *names}}


def table(results: dict[str, Any]) -> str:
    """Return the table: the median speed of the timed steps, and the largest difference of any step."""
    tokens = results["sequence_length"] * results["global_batch_size"]
    baseline = results["runs"]["none"]
    lines = [
        f"{results['training']} on {results['machine']}; sequences of {results['sequence_length']} tokens, "
        f"{results['global_batch_size']} per step, micro batch {results['micro_batch_size']}",
        "",
        "| speed optimization | tokens/s | speedup over baseline | peak GiB | max loss difference "
        "| max gradient norm difference |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, run in results["runs"].items():
        if "error" in run or "error" in baseline:
            lines.append(f"| {name} | {run.get('error', 'no baseline to compare with')} | | | | |")
            continue
        seconds, without = (statistics.median(each["seconds"]) for each in (run, baseline))
        lines.append(
            f"| {name} | {tokens / seconds:,.0f} | {without / seconds:.2f} | {run['peak'] / 2**30:.2f} "
            f"| {_max_difference(run['losses'], baseline['losses']):.1e} "
            f"| {_max_difference(run['norms'], baseline['norms']):.1e} |"
        )
    return "\n".join(lines)


def _max_difference(values: list[float], expected: list[float]) -> float:
    """Return the largest relative difference of any step."""
    return max(abs(value - other) / abs(other) for value, other in zip(values, expected, strict=True))


if __name__ == "__main__":
    sys.exit(main())
