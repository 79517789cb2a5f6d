"""From model.source to a directory, with the real huggingface_hub client in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, launch
from tests.hub import Hub, client_environment

TOKEN = "hf_OnlyForThisTestHub"
RESOLVE = """
import json, sys
from qwen_cl.config.errors import UserError
from qwen_cl.source.reference import local_directory, resolve

try:
    files = resolve(sys.argv[1], weights=sys.argv[2] == "True")
    directory = str(local_directory(files.source))
    answer = {"source": files.source, "directory": str(files.directory), "commit": files.commit,
              "size": files.config["hidden_size"], "local_directory": directory}
except UserError as error:
    answer = {"error": str(error)}
heavy = sorted({"torch", "nemo", "megatron"} & set(sys.modules))
print(json.dumps({**answer, "heavy": heavy}))
"""
SMALL_FILES = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"}
WEIGHT_FILES = {
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
}
ABSENT = ": no such model, or a private one; check the name, or `hf auth login` / HF_TOKEN"
NO_COMMIT = "0" * 40
UNUSED_FILES = {"pytorch_model.bin", "README.md", "modeling_custom.py", "original/consolidated.safetensors"}


def model_files(size: int) -> dict[str, bytes]:
    """As a repository holds them; what matters to these tests is which are fetched, not what they say."""
    files = {name: f"{name} of {size}".encode() for name in SMALL_FILES | WEIGHT_FILES | UNUSED_FILES}
    weight_map = {name: name for name in WEIGHT_FILES if name.endswith(".safetensors")}
    index = json.dumps({"weight_map": weight_map}).encode()
    return {**files, "config.json": json.dumps({"hidden_size": size}).encode(), "model.safetensors.index.json": index}


def offline(server: str) -> dict[str, Any]:
    return {"HF_HUB_OFFLINE": "1"} if server == "offline" else {}


@dataclass(frozen=True)
class Published:
    hub: Hub
    first: str
    """Tagged v1.0."""
    branch: str
    """The branch feature/japanese."""
    newest: str
    """The branch main."""


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Published]:
    with Hub(tmp_path / "hub", private={"org/private"}, gated={"org/gated"}, token=TOKEN) as hub:
        hub.publish("org/private", model_files(7), "main")
        hub.publish("org/gated", model_files(8), "main")
        first = hub.publish("org/tiny", model_files(1), "v1.0")
        branch = hub.publish("org/tiny", model_files(2), "feature/japanese")
        yield Published(hub, first, branch, hub.publish("org/tiny", model_files(3), "main"))


@dataclass(frozen=True)
class Machine:
    """Where the client runs: its cache and the Hub it asks."""

    home: Path
    endpoint: str

    def resolve(
        self, source: str, *, weights: bool = False, directory: Path | None = None, **environment: str
    ) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", RESOLVE, source, str(weights)],
            cwd=directory,
            env=client_environment(self.endpoint, self.home, PYTHONPATH=str(ROOT), **environment),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        assert answer.pop("heavy") == []
        return answer


@pytest.fixture
def machine(published: Published, tmp_path: Path) -> Machine:
    return Machine(tmp_path / "home", published.hub.url)


def names_in(directory: str) -> set[str]:
    return {str(path.relative_to(directory)) for path in Path(directory).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("revision", "attribute", "size"),
    [("", "newest", 3), ("@main", "newest", 3), ("@feature/japanese", "branch", 2), ("@v1.0", "first", 1)],
)
def test_a_name_resolves_to_its_commit(
    revision: str, attribute: str, size: int, published: Published, machine: Machine
) -> None:
    commit = getattr(published, attribute)
    answer = machine.resolve(f"hf://org/tiny{revision}")
    assert (answer["source"], answer["commit"], answer["size"]) == (f"hf://org/tiny@{commit}", commit, size)
    assert json.loads((Path(answer["directory"]) / "config.json").read_text()) == {"hidden_size": size}
    assert answer["local_directory"] == answer["directory"]


def test_a_commit_resolves_to_itself_and_is_not_asked_for_twice(published: Published, machine: Machine) -> None:
    source = f"hf://org/tiny@{published.first}"
    answer = machine.resolve(source, weights=True)
    assert (answer["source"], answer["commit"], answer["size"]) == (source, published.first, 1)
    published.hub.requests.clear()
    assert machine.resolve(source, weights=True) == answer
    assert published.hub.fetched() == set()


def test_a_branch_that_moved_resolves_anew(published: Published, machine: Machine) -> None:
    assert machine.resolve("hf://org/tiny")["commit"] == published.newest
    moved = published.hub.publish("org/tiny", model_files(4), "main")
    answer = machine.resolve("hf://org/tiny")
    assert (answer["commit"], answer["size"]) == (moved, 4)
    assert machine.resolve(f"hf://org/tiny@{published.newest}")["size"] == 3


def test_weights_are_fetched_only_when_asked_for(published: Published, machine: Machine) -> None:
    small = machine.resolve("hf://org/tiny", weights=False)
    assert {name for name in published.hub.fetched() if "safetensors" in name} == set()
    assert names_in(small["directory"]) >= {"config.json", "tokenizer.json"}
    whole = machine.resolve("hf://org/tiny", weights=True)
    assert published.hub.fetched() >= WEIGHT_FILES
    assert names_in(whole["directory"]) >= WEIGHT_FILES
    assert whole == small


def test_every_small_file_a_tokenizer_needs_is_fetched(published: Published, machine: Machine) -> None:
    """chat_template.jinja too: current transformers writes the template there, not into tokenizer_config.json."""
    assert names_in(machine.resolve("hf://org/tiny")["directory"]) == SMALL_FILES
    assert published.hub.fetched() == SMALL_FILES


@pytest.mark.parametrize("unused", sorted(UNUSED_FILES))
def test_what_is_not_needed_is_not_fetched(unused: str, published: Published, machine: Machine) -> None:
    answer = machine.resolve("hf://org/tiny", weights=True)
    assert unused not in published.hub.fetched() | names_in(answer["directory"])


@pytest.mark.parametrize("server", ["offline", "stopped"])
@pytest.mark.parametrize("revision", ["", "@v1.0", "@feature/japanese", "@commit"])
def test_the_cache_serves_without_the_hub(revision: str, server: str, published: Published, machine: Machine) -> None:
    source = f"hf://org/tiny{revision}".replace("@commit", f"@{published.first}")
    before = machine.resolve(source, weights=True)
    published.hub.requests.clear()
    if server == "stopped":
        published.hub.stop()
    after = machine.resolve(source, weights=True, **offline(server))
    assert after == before
    assert published.hub.requests == []


@pytest.mark.parametrize("server", ["offline", "stopped"])
@pytest.mark.parametrize("revision", ["", "@main", "@" + NO_COMMIT])
def test_neither_hub_nor_cache(revision: str, server: str, published: Published, machine: Machine) -> None:
    if server == "stopped":
        published.hub.stop()
    message = machine.resolve(f"hf://org/tiny{revision}", **offline(server))["error"]
    assert f"model.source (hf://org/tiny{revision})" in message
    assert "cache" in message
    assert "model=local model.source=DIRECTORY" in message


@pytest.mark.parametrize("server", ["offline", "stopped"])
def test_a_cache_without_the_weights_is_not_taken_for_whole(
    server: str, published: Published, machine: Machine
) -> None:
    """A dry run leaves the small files only; a run without a network must hear that, not that they are *.bin."""
    source = f"hf://org/tiny@{published.newest}"
    machine.resolve(source, weights=False)
    if server == "stopped":
        published.hub.stop()
    answer = machine.resolve(source, weights=True, **offline(server))
    assert f"model.source ({source})" in answer["error"]
    assert "cache" in answer["error"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("hf://org/absent", ABSENT),
        ("hf://org/private", ABSENT),
        ("hf://org/tiny@v9", ": no such revision; name a branch, tag or commit of it"),
        ("hf://org/tiny@" + NO_COMMIT, ": no such revision; name a branch, tag or commit of it"),
        ("hf://org/gated", " is gated: ask for access on its page, then `hf auth login` or set HF_TOKEN"),
    ],
)
def test_what_the_hub_refuses(source: str, reason: str, machine: Machine) -> None:
    assert machine.resolve(source)["error"] == f"model.source ({source}){reason}"


def test_a_model_without_safetensors(published: Published, machine: Machine) -> None:
    files = model_files(9)
    published.hub.publish("org/old", {name: files[name] for name in ("config.json", "pytorch_model.bin")}, "main")
    assert machine.resolve("hf://org/old", weights=False)["size"] == 9
    message = machine.resolve("hf://org/old", weights=True)["error"]
    assert message.startswith("model.source (hf://org/old)")
    assert "*.safetensors" in message


@pytest.mark.parametrize(("source", "size"), [("hf://org/private", 7), ("hf://org/gated", 8)])
def test_the_token_opens_what_is_closed(source: str, size: int, published: Published, machine: Machine) -> None:
    assert machine.resolve(source, HF_TOKEN=TOKEN)["size"] == size
    assert {request.authorization for request in published.hub.requests} == {f"Bearer {TOKEN}"}


def test_a_wrong_token_is_named_as_the_cause(machine: Machine) -> None:
    message = machine.resolve("hf://org/private", HF_TOKEN="hf_expired")["error"]
    assert "model.source (hf://org/private)" in message
    assert "HF_TOKEN" in message
    assert "did not answer" not in message
    assert "hf_expired" not in message


MALFORMED = ["hf://", "hf://onlyname", "hf://a/b/c", "hf://org/", "hf:///name", "hf://org/name@", "hf://org/na me"]


@pytest.mark.parametrize("source", MALFORMED)
def test_a_malformed_reference(source: str, published: Published, machine: Machine) -> None:
    message = f"model.source ({source}) must read hf://ORG/NAME or hf://ORG/NAME@REVISION"
    assert machine.resolve(source)["error"] == message
    assert published.hub.requests == []


@pytest.mark.parametrize("source", ["hf://../..", "hf://org/na--me", "hf://-org/name", "hf://org/name.git"])
def test_a_name_no_repository_can_have(source: str, published: Published, machine: Machine) -> None:
    assert f"model.source ({source})" in machine.resolve(source)["error"]
    assert published.hub.requests == []


def test_a_directory_resolves_to_its_absolute_path(tmp_path: Path, published: Published, machine: Machine) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"hidden_size": 5}')
    expected = {name: str(directory) for name in ("source", "directory", "local_directory")}
    expected |= {"commit": None, "size": 5}  # type: ignore[dict-item]
    assert machine.resolve("model", directory=tmp_path) == expected
    assert machine.resolve("~/model", HOME=str(tmp_path)) == expected
    assert published.hub.requests == []


def test_no_source_is_not_the_working_directory(tmp_path: Path, machine: Machine) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 5}')
    assert "model.source" in machine.resolve("", directory=tmp_path)["error"]


@pytest.mark.parametrize("source", ["absent", "file.txt", "~no-such-user/model"])
def test_not_a_directory(source: str, tmp_path: Path, machine: Machine) -> None:
    (tmp_path / "file.txt").write_text("")
    assert machine.resolve(source, directory=tmp_path)["error"] == (
        f"model.source ({source}) is not a directory; give one in Hugging Face layout, or hf://ORG/NAME"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing: model.source must be in Hugging Face layout (config.json, tokenizer.json, *.safetensors)"),
        (b"{", "cannot be read as JSON: "),
        (b"\xff", "cannot be read as JSON: "),
        (b"[1]", "must hold a JSON object"),
    ],
)
def test_a_config_that_cannot_be_used(content: bytes | None, message: str, tmp_path: Path, machine: Machine) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    assert machine.resolve(str(tmp_path))["error"].startswith(f"{tmp_path / 'config.json'} {message}")


def test_the_launcher_refuses_in_one_line_and_leaves_nothing(machine: Machine, tmp_path: Path) -> None:
    environment = client_environment(machine.endpoint, machine.home, HF_TOKEN=TOKEN)
    arguments = ("model=hub", "model.source=hf://org/absent", "dry_run=true")
    done = launch(*arguments, directory=tmp_path / "run", environment=environment)
    assert done.returncode == 2
    assert done.stderr == (
        "model.source (hf://org/absent): no such model, or a private one; check the name, "
        "or `hf auth login` / HF_TOKEN\n"
    )
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()
