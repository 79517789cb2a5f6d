"""Measure time and memory to load a model from safetensors: this loader, transformers, and a plain read.

``python benchmarks/load.py [--shape tiny|0.5b|7b] [--device cuda|cpu] [--repeats N]`` writes a Qwen2.5 of that shape
with random bf16 weights to a temporary directory. Each loader then loads it in a new process, in turns, from a warm
page cache. Imports, creation of the CUDA context and the first call of each loader are not timed: each loader first
builds a model with one layer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.arguments import default_device, existing_device, machine, positive  # noqa: E402
from benchmarks.loaders import LOADERS  # noqa: E402

COMMON = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def shape(hidden: int, ffn: int, layers: int, heads: int, groups: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    return {
        **COMMON,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "tiny": shape(512, 2048, 8, 8, 2, 8192, True),
    "0.5b": shape(896, 4864, 24, 14, 2, 151936, True),
    "1.5b": shape(1536, 8960, 28, 12, 2, 151936, True),
    "3b": shape(2048, 11008, 36, 16, 2, 151936, True),
    "7b": shape(3584, 18944, 28, 28, 4, 152064, False),
    "14b": shape(5120, 13824, 48, 40, 8, 152064, False),
    "32b": shape(5120, 27648, 64, 40, 8, 152064, False),
    "72b": shape(8192, 29568, 80, 64, 8, 152064, False),
}
TIMEOUT_SECONDS = 150
FILE_BYTES = 4 * 10**9  # of one safetensors file, as on the Hub


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument(
        "--device", type=existing_device, choices=("cuda", "cpu"), help="default: the GPU if there is one"
    )
    parser.add_argument("--repeats", type=positive, help="runs per loader; default 3, tiny 2")
    parser.add_argument("--directory", type=Path, help="parent of the temporary directory")
    arguments = parser.parse_args()
    device = arguments.device or default_device()
    repeats = arguments.repeats or (2 if arguments.shape == "tiny" else 3)
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="load-") as temporary:
        model, tiny = Path(temporary) / "model", Path(temporary) / "tiny"
        size = write_model(model, SHAPES[arguments.shape])
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in LOADERS if name != "import_ckpt"}
        for _ in range(repeats):
            for name, records in measured.items():
                records.append(_measure(name, model, device))
        print_table(arguments.shape, device, size, measured)
        write_model(tiny, SHAPES["tiny"])
        print_import_ckpt(_measure("import_ckpt", tiny, device))
    return 0 if all("error" not in record for record in measured["ours"]) else 1


def write_model(directory: Path, config: dict[str, Any]) -> int:
    """Write a model in Hugging Face layout with the demo model's tokenizer and return the bytes of its tensors."""
    import shutil

    from qwen_cl.models.architecture import read_architecture
    from qwen_cl.models.formats.tensor_files import INDEX
    from qwen_cl.models.weight_mapping import count_parameters, expected_shapes

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    for pattern in ("*token*", "*.jinja"):
        for path in (ROOT / "qwen_cl/demo/model").glob(pattern):
            shutil.copy(path, directory)
    shapes = expected_shapes(read_architecture(config, directory))
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, dimensions in shapes.items():
        if 2 * count_parameters(files[-1]) > FILE_BYTES:
            files.append({})
        files[-1][name] = dimensions
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        _write_tensors(directory / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    os.sync()  # so that pending writes do not disturb the measurement
    return 2 * count_parameters(shapes)


def _write_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write random tensors, each sliced from one random block: sampling 7e9 values would take a minute."""
    import torch
    from safetensors.torch import save_file

    block = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    tensors = {}
    for number, (name, dimensions) in enumerate(shapes.items()):
        tensor = torch.empty(dimensions, dtype=torch.bfloat16)
        flat, step = tensor.view(-1), len(block) - 7919 * (number % 1000)
        for start in range(0, len(flat), step):
            piece = flat[start : start + step]
            piece.copy_(block[-step:][: len(piece)])
        if name.endswith("norm.weight"):
            tensor += 1  # as in a new model; near 0, the loss is that of chance even when the weights are wrong
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def _measure(loader: str, model: Path, device: str) -> dict[str, Any]:
    """Return the record that the loader's process prints as its last line, or its error."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    print(f"{loader} …", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.loaders", loader, str(model), device],
            cwd=model.parent,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"timed out after {TIMEOUT_SECONDS} s"}
    lines = done.stdout.splitlines()
    if lines and lines[-1].startswith('{"'):
        record: dict[str, Any] = json.loads(lines[-1])
        return record
    return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}


def print_table(shape: str, device: str, size: int, measured: dict[str, list[dict[str, Any]]]) -> None:
    import rich
    from rich.console import Console
    from rich.table import Table

    table = Table(box=rich.box.SIMPLE, pad_edge=False)
    headings = [
        "loader",
        "timed",
        "s min",
        "s med",
        "GB/s",
        "RSS +MB",
        "anon +MB",
        "read MB",
        "written B",
        "device MB",
    ]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:2] else "right", overflow="fold")
    for name, records in measured.items():
        good = [record for record in records if "error" not in record]
        if not good:
            table.add_row(name, f"failed: {records[-1]['error']}")
            continue
        for timed in good[0]["seconds"]:
            table.add_row(name, timed, *_figures(good, timed, size))
    console = Console(width=150)
    console.print(f"Qwen2.5 {shape}: {size / 1e9:.2f} GB of bf16 safetensors, warm page cache, on {machine(device)}")
    console.print(table)
    console.print(
        "RSS: peak resident memory added, including mapped pages of the files; anon: without mapped pages, sampled. "
        "read: bytes read through read(), '-' for mapped files. written: bytes written to files. Memory is the "
        "maximum over all repeats, and the same in all rows of one process. " + measured["ours"][-1].get("note", "")
    )


def print_import_ckpt(record: dict[str, Any]) -> None:
    engine = "with" if importlib.util.find_spec("transformer_engine") else "without"
    if "error" in record:
        result = f"failed: {record['error'][:160]}"
    else:
        result = f"took {record['seconds']['import_ckpt']:.1f} s and wrote {record['written']:,} B"
    print(f"NeMo's llm.import_ckpt, tried on the tiny shape {engine} Transformer Engine, {result}")


def _figures(records: list[dict[str, Any]], timed: str, size: int) -> list[str]:
    seconds = [record["seconds"][timed] for record in records]
    read = max(record["read"] for record in records)
    return [
        f"{min(seconds):.3f}",
        f"{statistics.median(seconds):.3f}",
        f"{size / min(seconds) / 1e9:.2f}",
        *(f"{max(record[name] for record in records) / 1e6:,.0f}" for name in ("rss", "anonymous")),
        f"{read / 1e6:,.1f}" if read > size / 2 else "-",
        f"{max(record['written'] for record in records):,}",
        f"{max(record['device_peak'] for record in records) / 1e6:,.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
