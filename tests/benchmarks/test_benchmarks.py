"""Run each benchmark that needs no GPU at its smallest size: it prints its results, and the frameworks agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.warm import warm_environment


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--device", "cpu", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=warm_environment(dict(os.environ)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_throughput_beside_another_library(tmp_path: Path) -> None:
    arguments = ["--steps", "2", "--warmup-steps", "1", "--training", "full"]
    arguments += ["--frameworks", "qwen_cl", "transformers, eager", "--output", str(tmp_path / "results.json")]
    assert "losses of all frameworks agree at step 1" in run("throughput", *arguments)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [len(each["seconds"]) for each in results["runs"]] == [2, 4, 2]
    phases = results["runs"][0]["phase_started_at"]
    assert 0 < phases["starting"] < phases["training"] < results["runs"][0]["first_step"]
    assert str(tmp_path) not in results["command"]


@pytest.mark.parametrize(
    ("said", "rule"),
    [
        ("--frameworks nobody", "argument --frameworks: invalid choice: 'nobody'"),
        ("--steps 0", "argument --steps: 0 must be a positive integer"),
        ("--global-batch 9", "--micro-batch 2 must divide --global-batch 9, the sequences per step"),
        ("--table nothing.json", "argument --table: nothing.json: no such file"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(said: str, rule: str) -> None:
    command = [sys.executable, "benchmarks/throughput.py", "--device", "cpu", *said.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"throughput.py: error: {rule}")


def test_the_order_of_the_frameworks() -> None:
    """A-B-C-C-B-A, where the two in the middle share a process."""
    from benchmarks.throughput import run_order

    assert run_order(["a", "b", "c"], 2) == [("a", 1), ("b", 1), ("c", 2), ("b", 1), ("a", 1)]
    assert run_order(["a", "b", "c"], 1) == [("a", 1), ("b", 1), ("c", 1)]
    assert run_order(["a"], 2) == [("a", 1), ("a", 1)]


@pytest.mark.slow
def test_a_speed_optimization_alone(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    arguments = ["--optimizations", "fused_lora", "--steps", "1", "--warmup-steps", "1", "--output", str(output)]
    printed = run("speed_optimizations", *arguments)
    runs = json.loads(output.read_text(encoding="utf-8"))["runs"]
    assert list(runs) == ["none", "fused_lora"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == list(runs)
    assert all(0 <= float(difference) < 1e-5 for row in rows[2:] for difference in row[4:])


@pytest.mark.slow
def test_packed_rows_beside_padded_ones() -> None:
    rows = [
        line.split("|")
        for line in run("packing", "--warmup-steps", "1", "--steps", "1").splitlines()
        if line.startswith("|")
    ]
    assert [row[1].strip() for row in rows[2:]] == ["qwen_cl, packed", "qwen_cl, not packed", "transformers, padded"]
    assert all(float(row[2].replace(",", "")) > 0 for row in rows[2:])
    before, after = ([float(row[place]) for row in rows[2:4]] for place in (4, 5))
    assert before[0] == before[1] and after[0] == pytest.approx(after[1], rel=0.01)
    assert before[0] - after[0] > 0.5  # it learned something
