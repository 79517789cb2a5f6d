"""What each lever on speed does alone, in one command: ``python benchmarks/levers.py [--help]``.

Trains the same rows from the same weights with no lever, with each alone, and with all, every run a process as
``python launch.py`` starts it, and prints a table in Markdown: speed, memory, and how far losses and norms of the
gradient come from those without levers. On a GPU a Qwen2.5-0.5B of random weights in bf16, on a CPU the embedded model
in fp32.
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

LEVERS = {
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
ALL, SLOWER = "all that gain", ("activation_recompute",)
OF_LORA, OF_A_GPU = ("fused_lora",), ("cuda_graphs",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", type=existing_device, choices=("cuda", "cpu"), help="default: the GPU if there is one"
    )
    parser.add_argument("--training", choices=("lora", "full"), default="lora")
    parser.add_argument(
        "--levers", nargs="+", choices=[*LEVERS, ALL], help="default: all that there are for the device"
    )
    parser.add_argument("--warmup-steps", type=positive, default=8)
    parser.add_argument("--steps", type=positive, default=12, help="that are timed")
    parser.add_argument("--output", type=Path, help="also write what was measured, as JSON, after each run")
    parser.add_argument("--directory", type=Path, help="where the temporary directory with model and runs is made")
    parser.add_argument("--table", type=existing_file, help="print the table of a file of results, and measure nothing")
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
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="levers-") as temporary:
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
        for name, overrides in _chosen(arguments.levers, arguments.training, on_gpu).items():
            said = ["speed=off", *overrides]
            results["runs"][name] = throughput._visit(OURS, specification, base / f"run-{len(results['runs'])}", said)
            if arguments.output:
                arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _chosen(names: list[str] | None, training: str, on_gpu: bool) -> dict[str, list[str]]:
    there = {
        name: said
        for name, said in LEVERS.items()
        if (training == "lora" or name not in OF_LORA) and (on_gpu or name not in OF_A_GPU)
    }
    there[ALL] = [override for name, said in there.items() if name not in SLOWER for override in said]
    return there if names is None else {name: said for name, said in there.items() if name in {"none", *names}}


def table(results: dict[str, Any]) -> str:
    """Medians of the timed steps; of losses and norms the largest difference of any step."""
    tokens = results["sequence_length"] * results["global_batch_size"]
    plain = results["runs"]["none"]
    lines = [
        f"{results['training']} on {results['machine']}; rows of {results['sequence_length']} tokens, "
        f"{results['global_batch_size']} a step, micro batch {results['micro_batch_size']}",
        "",
        "| lever | tokens/s | times none | peak GiB | loss apart | norm apart |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, run in results["runs"].items():
        if "error" in run or "error" in plain:
            lines.append(f"| {name} | {run.get('error', 'nothing to compare with')} | | | | |")
            continue
        seconds, alone = (statistics.median(each["seconds"]) for each in (run, plain))
        lines.append(
            f"| {name} | {tokens / seconds:,.0f} | {alone / seconds:.2f} | {run['peak'] / 2**30:.2f} "
            f"| {_apart(run['losses'], plain['losses']):.1e} | {_apart(run['norms'], plain['norms']):.1e} |"
        )
    return "\n".join(lines)


def _apart(ours: list[float], theirs: list[float]) -> float:
    """Relative."""
    return max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    sys.exit(main())
