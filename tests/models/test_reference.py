"""The resolution of model.source to a directory, with the real huggingface_hub client in its own processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import launch
from tests.support.fault_table import Row
from tests.support.hub import client_environment
from tests.support.machine import SMALL_FILES, TOKEN, WEIGHT_FILES, Machine, model_files, new_machine

pytestmark = pytest.mark.slow

ABSENT = ": no such model, or a private one; check the name, or `hf auth login` / HF_TOKEN"
NO_COMMIT = "0" * 40


def offline(server: str) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1"} if server == "offline" else {}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with new_machine(tmp_path) as machine:
        yield machine


def names_in(directory: str) -> set[str]:
    return {str(path.relative_to(directory)) for path in Path(directory).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("revision", "attribute", "size"),
    [("", "newest", 3), ("@main", "newest", 3), ("@feature/japanese", "branched", 2), ("@v1.0", "tagged", 1)],
)
def test_a_name_resolves_to_its_commit(revision: str, attribute: str, size: int, machine: Machine) -> None:
    commit = getattr(machine, attribute)
    answer = machine.resolve(f"hf://org/tiny{revision}")
    assert (answer["source"], answer["commit"], answer["size"]) == (f"hf://org/tiny@{commit}", commit, size)
    assert (Path(answer["directory"]) / "config.json").read_bytes() == model_files(size)["config.json"]
    assert answer["local_directory"] == answer["directory"]


def test_a_commit_resolves_to_itself_and_is_not_asked_for_twice(machine: Machine) -> None:
    source = f"hf://org/tiny@{machine.tagged}"
    answer = machine.resolve(source, weights=True)
    assert (answer["source"], answer["commit"], answer["size"]) == (source, machine.tagged, 1)
    machine.hub.requests.clear()
    assert machine.resolve(source, weights=True) == answer
    assert machine.hub.fetched() == set()


def test_a_branch_that_moved_resolves_anew(machine: Machine) -> None:
    assert machine.resolve("hf://org/tiny")["commit"] == machine.newest
    moved = machine.hub.publish("org/tiny", model_files(4), "main")
    answer = machine.resolve("hf://org/tiny")
    assert (answer["commit"], answer["size"]) == (moved, 4)
    assert machine.resolve(f"hf://org/tiny@{machine.newest}")["size"] == 3


def test_what_is_needed_is_fetched_and_nothing_else(machine: Machine) -> None:
    """Fetch the chat template too, which current transformers writes outside tokenizer_config.json."""
    small = machine.resolve("hf://org/tiny", weights=False)
    assert machine.hub.fetched() == names_in(small["directory"]) == SMALL_FILES
    assert machine.resolve("hf://org/tiny", weights=True) == small
    assert machine.hub.fetched() == names_in(small["directory"]) == SMALL_FILES | WEIGHT_FILES


@pytest.mark.parametrize("server", ["offline", "stopped"])
@pytest.mark.parametrize("revision", ["", "@v1.0", "@feature/japanese", "@commit"])
def test_the_cache_serves_without_the_hub(revision: str, server: str, machine: Machine, row: Row) -> None:
    source = f"hf://org/tiny{revision}".replace("@commit", f"@{machine.tagged}")
    before = machine.resolve(source, weights=True)
    machine.hub.requests.clear()
    if server == "stopped":
        machine.hub.stop()
    after = machine.resolve(source, weights=True, **offline(server))
    assert after == before
    assert machine.hub.requests == []
    row("the Hub unreachable, the model in the cache", "the run starts from the cache", "nothing")


@pytest.mark.parametrize("server", ["offline", "stopped"])
@pytest.mark.parametrize("revision", ["", "@main", "@" + NO_COMMIT])
def test_neither_hub_nor_cache(revision: str, server: str, machine: Machine, row: Row) -> None:
    if server == "stopped":
        machine.hub.stop()
    message = machine.resolve(f"hf://org/tiny{revision}", **offline(server))["error"]
    assert f"model.source (hf://org/tiny{revision})" in message
    assert "cache" in message
    assert "model=local model.source=DIRECTORY" in message
    row("the Hub unreachable, the cache empty", "refused with exit code 2, with the ways out", "nothing")


@pytest.mark.parametrize("server", ["offline", "stopped"])
def test_a_cache_without_the_weights_is_not_taken_for_whole(server: str, machine: Machine) -> None:
    """Name the missing weights after a dry run, which fetches only the small files, and without a network."""
    source = f"hf://org/tiny@{machine.newest}"
    machine.resolve(source, weights=False)
    if server == "stopped":
        machine.hub.stop()
    answer = machine.resolve(source, weights=True, **offline(server))
    assert f"model.source ({source})" in answer["error"]
    assert "cache" in answer["error"]


def test_what_the_hub_refuses(machine: Machine) -> None:
    reasons = {
        "hf://org/absent": ABSENT,
        "hf://org/private": ABSENT,
        "hf://org/tiny@v9": ": no such revision; name a branch, tag or commit of it",
        f"hf://org/tiny@{NO_COMMIT}": ": no such revision; name a branch, tag or commit of it",
        "hf://org/gated": " is gated: ask for access on its page, then `hf auth login` or set HF_TOKEN",
    }
    expected = [{"error": f"model.source ({source}){reason}"} for source, reason in reasons.items()]
    assert machine.resolve_all(list(reasons)) == expected


def test_a_model_without_safetensors(machine: Machine) -> None:
    files = model_files(9)
    names = ("config.json", "tokenizer.json", "pytorch_model.bin")
    commit = machine.hub.publish("org/old", {name: files[name] for name in names}, "main")
    reason = "holds no *.safetensors (found pytorch_model.bin); weights are read from safetensors only"
    for weights in (False, True):
        answer = machine.resolve("hf://org/old", weights=weights)
        assert answer == {"error": f"model.source (hf://org/old): commit {commit[:12]} {reason}"}
    assert machine.hub.fetched() == set()


@pytest.mark.parametrize(("source", "size"), [("hf://org/private", 7), ("hf://org/gated", 8)])
def test_the_token_opens_what_is_closed(source: str, size: int, machine: Machine) -> None:
    assert machine.resolve(source, HF_TOKEN=TOKEN)["size"] == size
    assert {request.authorization for request in machine.hub.requests} == {f"Bearer {TOKEN}"}


def test_a_wrong_token_is_named_as_the_cause(machine: Machine) -> None:
    message = machine.resolve("hf://org/private", HF_TOKEN="hf_expired")["error"]
    assert "model.source (hf://org/private)" in message
    assert "HF_TOKEN" in message
    assert "did not answer" not in message
    assert "hf_expired" not in message


def test_a_malformed_reference(machine: Machine) -> None:
    sources = ["hf://", "hf://onlyname", "hf://a/b/c", "hf://org/", "hf:///name", "hf://org/name@", "hf://org/na me"]
    rule = "must read hf://ORG/NAME or hf://ORG/NAME@REVISION"
    assert machine.resolve_all(sources) == [{"error": f"model.source ({source}) {rule}"} for source in sources]
    assert machine.hub.requests == []


def test_a_name_no_repository_can_have(machine: Machine) -> None:
    sources = ["hf://../..", "hf://org/na--me", "hf://-org/name", "hf://org/name.git"]
    for source, answer in zip(sources, machine.resolve_all(sources)):
        assert f"model.source ({source})" in answer["error"]
    assert machine.hub.requests == []


def test_a_directory_resolves_to_its_absolute_path(tmp_path: Path, machine: Machine) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"hidden_size": 5}')
    expected = {name: str(directory) for name in ("source", "directory", "local_directory")}
    expected |= {"commit": None, "size": 5, "license": None}  # type: ignore[dict-item]
    sources = ["model", "~/model", str(directory)]
    assert machine.resolve_all(sources, directory=tmp_path, HOME=str(tmp_path)) == [expected] * 3
    assert machine.hub.requests == []


def test_not_a_directory(tmp_path: Path, machine: Machine) -> None:
    """Refuse an empty source, instead of using the working directory, even if it holds a model."""
    (tmp_path / "config.json").write_text('{"hidden_size": 5}')
    sources = ["", "absent", "config.json", "~no-such-user/model"]
    rule = "is not a directory; give one in Hugging Face layout, a NeMo 2.0 checkpoint, or hf://ORG/NAME"
    answers = machine.resolve_all(sources, directory=tmp_path)
    assert answers == [{"error": f"model.source ({source}) {rule}"} for source in sources]


def test_a_config_that_cannot_be_used(tmp_path: Path, machine: Machine) -> None:
    contents = {"absent": None, "cut": b"{", "binary": b"\xff", "list": b"[1]"}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "config.json").write_bytes(content)
    reasons = [
        "is missing: model.source must be in Hugging Face layout (config.json, tokenizer.json, *.safetensors)",
        "cannot be read as JSON: ",
        "cannot be read as JSON: ",
        "must hold a JSON object",
    ]
    answers = machine.resolve_all([str(tmp_path / name) for name in contents])
    for name, reason, answer in zip(contents, reasons, answers):
        assert answer["error"].startswith(f"{tmp_path / name / 'config.json'} {reason}")


def test_the_launcher_refuses_in_one_line_and_leaves_nothing(machine: Machine, tmp_path: Path) -> None:
    environment = client_environment(machine.hub.url, machine.home, HF_TOKEN=TOKEN)
    arguments = ["model=hub", "model.source=hf://org/absent", "dry_run=true"]
    done = launch(*arguments, directory=tmp_path / "run", environment=environment)
    assert done.returncode == 2
    assert (done.stdout, done.stderr) == ("", f"model.source (hf://org/absent){ABSENT}\n")
    assert not (tmp_path / "run").exists()
