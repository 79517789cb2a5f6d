"""Replacements in other packages: all are in the table, and are made only in code that is known."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from qwen_cl.patches.registry import Patch, patches, replace
from tests.conftest import ROOT, launch
from tests.support.fault_table import Row

AT_THE_END = """
import atexit, json, os, sys

def report():
    if "nemo.lightning" in sys.modules:
        from tests.support.patched_names import patched_names

        with open(os.environ["PATCHED_NAMES"], "w") as stream:
            json.dump(patched_names(), stream)

atexit.register(report)
"""
SETTINGS = {"compiler.disable"}
"""Of torch._dynamo.config, which is there to be set."""


def test_the_docs_have_the_table() -> None:
    printed = subprocess.run([sys.executable, "-m", "qwen_cl.patches"], capture_output=True, text=True, check=True)
    assert len(printed.stdout.splitlines()) == len(patches()) + 2
    assert printed.stdout in (ROOT / "docs/patches.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_all_that_a_run_replaces_is_in_the_table(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(AT_THE_END)
    found = tmp_path / "names.json"
    environment = {"PYTHONPATH": str(tmp_path), "PATCHED_NAMES": str(found)}
    done = launch("experiment=smoke", directory=tmp_path / "run", environment=environment)
    assert done.returncode == 0, done.stderr
    names = set(json.loads(found.read_text()))
    assert names - patches().keys() == {"megatron.core.inference.unified_memory:load_inline"}  # imported by its name
    assert {
        "torch.cuda:stream",
        "torch.nn.modules.module:Module.cuda",
        "nemo.lightning.resume:AutoResume.setup",
        "nemo.collections.llm.peft.dora:DoRALinear.forward",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",
        "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.preload_tensors",
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
    } <= names


@pytest.mark.parametrize("file", sorted((ROOT / "qwen_cl").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_set_in_another_package_but_through_the_registry(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).partition(".")[0] not in {"qwen_cl", *sys.stdlib_module_names}
    }
    targets: list[ast.expr] = [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    ]
    targets += [
        node.args[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr"
    ]
    written = {ast.unparse(target) for target in targets}
    assert {text for text in written if text.partition(".")[0] in imported} <= SETTINGS


@pytest.mark.parametrize("patch", patches().values(), ids=lambda patch: patch.name)
def test_the_table_says_who_replaces_it(patch: Patch) -> None:
    assert f'"{patch.name.replace(":", ".").rpartition(".")[2]}"' in (ROOT / patch.by).read_text(encoding="utf-8")


def test_what_the_table_does_not_list_is_not_replaced() -> None:
    with pytest.raises(LookupError, match=r"table\.yaml does not list json:dumps"):
        replace(json, "dumps", str)
    assert json.dumps({}) == "{}"


@pytest.fixture
def changed_megatron(tmp_path: Path) -> Path:
    """A folder that comes before the installed packages, with a megatron-core of which one method is another."""
    spec = find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations
    core = tmp_path / "packages/megatron/core"
    shutil.copytree(
        spec.submodule_search_locations[0],
        core,
        copy_function=os.symlink,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    file = core / "optimizer/distrib_optimizer.py"
    text = file.read_text(encoding="utf-8")
    file.unlink()
    first = "    def load_state_dict(self, state_dict):\n"
    assert first in text
    file.write_text(text.replace(first, first.replace("):", ", strict=True):")), encoding="utf-8")
    return tmp_path / "packages"


REFUSED = (
    "megatron-core 0.15.3 is not supported: its megatron.core.optimizer.distrib_optimizer."
    "DistributedOptimizer.load_state_dict differs from that of megatron-core==0.15.3, for which qwen_cl replaces "
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict; run "
    "pip install --force-reinstall --no-deps 'megatron-core==0.15.3'"
)


@pytest.mark.slow
def test_a_run_with_other_code_than_was_known_is_refused(changed_megatron: Path, tmp_path: Path, row: Row) -> None:
    environment = {"PYTHONPATH": str(changed_megatron)}
    done = launch("experiment=smoke", directory=tmp_path / "run", environment=environment)
    assert (done.returncode, done.stderr) == (2, f"{REFUSED}\n")
    assert not (tmp_path / "run").exists()
    row(
        "another release of NeMo, Megatron, Lightning or torch, whose replaced code differs",
        "refused with exit code 2, with the command that installs the right one",
        "nothing",
    )


@pytest.mark.slow
def test_a_rank_refuses_it_too(changed_megatron: Path) -> None:
    """Check a rank of a cluster, whose packages the launcher does not see."""
    done = subprocess.run(
        [sys.executable, "-c", "from qwen_cl.training import setup; setup.prepare(cpu=True)"],
        env={**os.environ, "PYTHONPATH": str(changed_megatron)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"qwen_cl.patches.registry.UpstreamChanged: {REFUSED}"


NAMELESS = """
import sys, types

from qwen_cl.training import setup

setup.prepare(cpu=True)
sys.modules["a_compiled_part"] = types.SimpleNamespace()
import megatron.core.tensor_parallel.layers as importer
import megatron.core.utils as owner
from qwen_cl.patches.registry import replace_everywhere

replace_everywhere(owner, "get_tensor_model_parallel_group_if_none", print)
print(importer.get_tensor_model_parallel_group_if_none is print)
"""


@pytest.mark.slow
def test_objects_without_a_name_among_the_modules_are_left_out() -> None:
    """Compiled packages, such as Cython's, add them to sys.modules."""
    done = subprocess.run([sys.executable, "-c", NAMELESS], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"
