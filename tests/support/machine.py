"""A client machine of the test Hub: resolve() in separate processes, with the real huggingface_hub client."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.support.hub import Hub, client_environment

TOKEN = "hf_OnlyForThisTestHub"
RESOLVE = """
import json, sys
from qwen_cl.config.errors import UserError
from qwen_cl.models.hub.settings import HubSettings
from qwen_cl.models.reference import local_directory, resolve

asked = json.loads(sys.argv[1])

def answer(source):
    try:
        files = resolve(source, HubSettings(**asked["settings"]), weights=asked["weights"])
    except UserError as error:
        return {"error": str(error)}
    answer = {"source": files.source, "directory": str(files.directory), "commit": files.commit,
              "size": files.config["hidden_size"], "license": files.manifest and files.manifest.license}
    return answer if "cache" in asked["settings"] else {**answer, "local_directory": str(local_directory(files.source))}

answers = [answer(source) for source in asked["sources"]]
print(json.dumps([answers, sorted({"torch", "nemo", "megatron"} & set(sys.modules))]))
"""
SMALL_FILES = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"}
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
WEIGHT_FILES = {SHARD, INDEX}
UNUSED_FILES = {
    "pytorch_model.bin",
    "README.md",
    "modeling_custom.py",
    "tokenizer_custom.py",
    "consolidated.safetensors",
    "original/consolidated.safetensors",
}


def model_files(size: int) -> dict[str, bytes]:
    """Return a repository's files; these tests only check which are fetched, not their content."""
    files = {name: f"{name} of {size}".encode() for name in SMALL_FILES | WEIGHT_FILES | UNUSED_FILES}
    index = {"weight_map": {"model.norm.weight": SHARD}}
    config = {"hidden_size": size, "auto_map": {"AutoModelForCausalLM": "modeling_custom.Model"}}
    files["README.md"] = b"---\nlicense: apache-2.0\n---\n"
    files |= {"config.json": json.dumps(config).encode(), INDEX: json.dumps(index).encode()}
    return {**files, SHARD: weights_of(size)}


def weights_of(size: int) -> bytes:
    """Return weights large enough to be in LFS."""
    return f"weights of {size} ".encode() * 1000


@dataclass(frozen=True)
class Machine:
    """A client with an empty cache, and its Hub."""

    home: Path
    hub: Hub
    tagged: str
    branched: str
    newest: str
    said: list[str] = field(default_factory=list)
    """The lines on stderr so far."""

    def resolve(self, source: str, **how: Any) -> dict[str, Any]:
        return self.resolve_all([source], **how)[0]

    def resolve_all(
        self,
        sources: list[str],
        *,
        weights: bool = False,
        directory: Path | None = None,
        settings: dict[str, Any] | None = None,
        **environment: str,
    ) -> list[dict[str, Any]]:
        return self.answers(self.start(sources, weights, directory, settings, environment))

    def start(
        self,
        sources: list[str],
        weights: bool = False,
        directory: Path | None = None,
        settings: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Resolve in a process that runs while others do; ``answers`` waits for it."""
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                RESOLVE,
                json.dumps({"sources": sources, "weights": weights, "settings": settings or {}}),
            ],
            cwd=directory,
            env=client_environment(self.hub.url, self.home, PYTHONPATH=str(ROOT), **(environment or {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def answers(self, process: subprocess.Popen[str]) -> list[dict[str, Any]]:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        assert TOKEN not in stdout + stderr
        self.said.extend(stderr.splitlines())
        answers, heavy_modules = json.loads(stdout)
        assert heavy_modules == []
        return list(answers)

    @property
    def repository(self) -> Path:
        """Return the folder of org/tiny in the cache."""
        return self.home / "hub" / "models--org--tiny"


@contextmanager
def new_machine(directory: Path) -> Iterator[Machine]:
    """Return a machine whose Hub has org/tiny with a tag, a branch and main, org/private and org/gated."""
    with Hub(directory / "hub", private={"org/private"}, gated={"org/gated"}, token=TOKEN) as hub:
        hub.publish("org/private", model_files(7), "main")
        hub.publish("org/gated", model_files(8), "main")
        tagged = hub.publish("org/tiny", model_files(1), "v1.0")
        branched = hub.publish("org/tiny", model_files(2), "feature/japanese")
        newest = hub.publish("org/tiny", model_files(3), "main")
        yield Machine(directory / "home", hub, tagged, branched, newest)
