"""The resolution from a complete, incomplete or damaged Hub cache, with the real huggingface_hub client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fault_table import Row
from tests.support.hub import Fault, Hub, client_environment
from tests.support.machine import INDEX, SHARD, SMALL_FILES, WEIGHT_FILES, Machine, model_files, new_machine

pytestmark = pytest.mark.slow

OFFLINE = {"HF_HUB_OFFLINE": "1"}
ELSEWHERE = "or copy the model to a directory and write model=local model.source=DIRECTORY"
WITHOUT = (
    "connect once to fetch the rest, or copy the model to a directory and write model=local model.source=DIRECTORY"
)
WHOLE = SMALL_FILES | WEIGHT_FILES
BY_HUGGINGFACE_HUB = """
import sys
from huggingface_hub import scan_cache_dir, snapshot_download
print(snapshot_download("org/tiny", allow_patterns=sys.argv[1:]))
print(scan_cache_dir().warnings)
"""


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with new_machine(tmp_path) as machine:
        yield machine


def by_huggingface_hub(machine: Machine, *names: str) -> list[str]:
    """Fill the cache as another tool does, with these files only; return the lines it printed."""
    command = [sys.executable, "-c", BY_HUGGINGFACE_HUB, *names]
    environment = client_environment(machine.hub.url, machine.home)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def damage(path: Path, *, notice: bool = True) -> None:
    """Change one byte; without ``notice``, size and time of the file stay unchanged."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.resolve().write_bytes(content)
    if not notice:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_keys_of_the_config_lead_to_the_mirror_and_the_cache(machine: Machine, tmp_path: Path) -> None:
    """Prefer the endpoint to HF_ENDPOINT, and accept a relative cache, or one in the home directory."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    for cache in ("models", "~/models"):
        settings = {"endpoint": f"{machine.hub.url}/", "cache": cache}
        answer = machine.resolve("hf://org/tiny", weights=True, directory=tmp_path, settings=settings, **nowhere)
        expected = tmp_path / "models/models--org--tiny/snapshots" / machine.newest
        assert (answer["directory"], answer["license"]) == (str(expected), "apache-2.0")
        assert {path.name for path in expected.iterdir()} == WHOLE
    assert not machine.home.exists()
    machine.hub.requests.clear()
    assert machine.resolve("hf://org/tiny", weights=True, directory=tmp_path, settings={**settings, "offline": True})
    assert machine.hub.requests == []


def test_a_cache_that_is_none(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reasons = {
        str(tmp_path / "file"): " is not a directory",
        "~no-such-user/models": ": no such user; write the directory's path",
    }
    for cache, reason in reasons.items():
        assert machine.resolve("hf://org/tiny", settings={"cache": cache}) == {
            "error": f"model.cache ({cache}){reason}"
        }
    cache = str(tmp_path / "file/models")
    error = machine.resolve("hf://org/tiny", settings={"cache": cache})["error"]
    assert error.startswith(f"model.cache ({cache}): ")
    assert "cannot be written: Not a directory" in error


def test_offline_asks_nothing_and_says_what_is_missing(machine: Machine) -> None:
    refused = f"model.source (hf://org/tiny) is not in the cache ({machine.home / 'hub'}), and model.offline or "
    assert machine.resolve("hf://org/tiny", settings={"offline": True})["error"].startswith(refused)
    machine.resolve("hf://org/tiny")
    machine.hub.requests.clear()
    [dry, run] = [machine.resolve("hf://org/tiny", weights=weights, **OFFLINE) for weights in (False, True)]
    assert dry["commit"] == machine.newest
    assert run["error"] == (
        f"model.source (hf://org/tiny): the cache ({machine.home / 'hub'}) lacks {INDEX} of commit "
        f"{machine.newest[:12]}, and model.offline or HF_HUB_OFFLINE forbids asking the Hub; allow it once, {ELSEWHERE}"
    )
    assert machine.hub.requests == []


@pytest.mark.parametrize("name", [SHARD, INDEX, "merges.txt"])
def test_a_file_that_went_missing_is_named_offline_and_fetched_online(name: str, machine: Machine) -> None:
    pinned = machine.resolve("hf://org/tiny", weights=True)
    (Path(pinned["directory"]) / name).unlink()
    error = machine.resolve("hf://org/tiny", weights=True, **OFFLINE)["error"]
    assert f"lacks {name} of commit {machine.newest[:12]}" in error
    (Path(pinned["directory"]) / name).resolve().unlink(missing_ok=True)
    assert machine.resolve(pinned["source"], weights=True) == pinned


@pytest.mark.slow
def test_a_cache_filled_by_another_tool_is_judged_by_its_files(machine: Machine) -> None:
    """Use a complete cache without a network, and refuse one that lacks a required file."""
    [directory, warnings] = by_huggingface_hub(machine, *WHOLE)
    answer = machine.resolve("hf://org/tiny", weights=True, **OFFLINE)
    assert (answer["directory"], answer["license"]) == (directory, None)
    where = f"model.source (hf://org/tiny): commit {machine.newest[:12]} in the cache ({machine.home / 'hub'})"
    lacking = {
        SHARD: f"lacks {SHARD} of commit {machine.newest[:12]}",
        INDEX: f"holds neither model.safetensors nor {INDEX} of commit {machine.newest[:12]}; connect once",
        "tokenizer.json": f"{where} holds no tokenizer (tokenizer.json, tokenizer.model, or vocab.json and merges.txt)",
        "config.json": f"{where} holds no config.json; a model in Hugging Face layout has one",
    }
    for name, reason in lacking.items():
        aside = (Path(directory) / name).rename(Path(directory).parent / name)
        assert reason in machine.resolve("hf://org/tiny", weights=True, **OFFLINE)["error"]
        aside.rename(Path(directory) / name)
    assert machine.resolve("hf://org/tiny", weights=True)["directory"] == directory
    assert by_huggingface_hub(machine, *WHOLE) == [directory, warnings]
    assert warnings == "[]"  # our files in the cache do not disturb it


@pytest.mark.parametrize("by", ["us", "another tool"])
@pytest.mark.parametrize(("name", "size"), [(SHARD, "13.0 kB"), ("merges.txt", "15 bytes")])
def test_one_changed_byte_is_caught(name: str, size: str, by: str, machine: Machine, row: Row) -> None:
    """Detect damage by sha256 in LFS, by git's blob id elsewhere, and by the blob's name without a manifest."""
    directory = Path(by_huggingface_hub(machine, *WHOLE)[0])
    if by == "us":
        machine.resolve("hf://org/tiny", weights=True)
    source, blob = f"hf://org/tiny@{machine.newest}", (directory / name).resolve()
    damage(directory / name)
    machine.hub.requests.clear()
    assert machine.resolve(source, weights=True, **OFFLINE)["error"] == (
        f"model.source ({source}): {name} in the cache is damaged, and model.offline or HF_HUB_OFFLINE forbids "
        f"asking the Hub; remove {blob} and allow it once"
    )
    assert machine.hub.requests == []
    assert machine.resolve(source, weights=True)["directory"] == str(directory)
    assert machine.said[-2:] == [
        f"{name} of {source} is damaged in the cache ({blob}): fetching it again",
        f"Fetching 1 file ({size}) of {source}",
    ]
    assert (directory / name).read_bytes() == model_files(3)[name]
    assert machine.hub.fetched() == {name}
    row(
        "a byte changed in the Hub's cache",
        "found by its hash, and fetched again; refused where there is no Hub",
        "nothing",
    )


def test_a_file_that_cannot_be_read(machine: Machine) -> None:
    path = Path(machine.resolve("hf://org/tiny")["directory"]) / "config.json"
    blob = path.resolve()
    blob.unlink()
    blob.mkdir()
    error = machine.resolve("hf://org/tiny")["error"]
    assert error == f"{path} cannot be read: Is a directory; check its permissions and the disk"


def test_content_is_hashed_once(machine: Machine) -> None:
    """Hash a file again only if its size or time changed, which a failing disk does not change."""
    pinned = machine.resolve("hf://org/tiny", weights=True)
    damage(Path(pinned["directory"]) / SHARD, notice=False)
    machine.hub.requests.clear()
    assert machine.resolve(pinned["source"], weights=True) == pinned
    assert machine.hub.requests == []


def test_a_download_that_comes_damaged(machine: Machine) -> None:
    machine.hub.inject(SHARD, Fault.corrupt, 100)
    assert machine.resolve("hf://org/tiny", weights=True)["commit"] == machine.newest
    machine.hub.inject("tokenizer.json", Fault.corrupt, 3, times=2)
    assert machine.resolve("hf://org/tiny@v1.0", weights=True)["error"] == (
        "model.source (hf://org/tiny@v1.0): tokenizer.json was damaged in both downloads from the Hub: its content "
        f"is not that of commit {machine.tagged[:12]}; try later, or another model.endpoint"
    )
    assert "lacks tokenizer.json" in machine.resolve(f"hf://org/tiny@{machine.tagged}", **OFFLINE)["error"]


def test_a_damaged_file_that_is_not_the_caches_own_is_left_alone(machine: Machine, tmp_path: Path) -> None:
    directory = Path(machine.resolve("hf://org/tiny")["directory"])
    mine = tmp_path / "tokenizer.json"
    mine.write_text("of my own")
    (directory / mine.name).unlink()
    (directory / mine.name).symlink_to(mine)
    assert machine.resolve("hf://org/tiny")["directory"] == str(directory)
    assert (directory / mine.name).read_bytes() == model_files(3)["tokenizer.json"]
    assert mine.read_text() == "of my own"


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("../../../../secret.safetensors", "file name '../../../../secret.safetensors' leaves the directory"),
        ("pytorch_model.bin", "pytorch_model.bin is not a safetensors file, and no other kind is read"),
        ("model-00002-of-00002.safetensors", "names model-00002-of-00002.safetensors, which the commit does not hold"),
    ],
)
def test_an_index_that_names_what_is_not_fetched(file: str, reason: str, machine: Machine) -> None:
    index = json.dumps({"weight_map": {"model.norm.weight": file}}).encode()
    machine.hub.publish("org/odd", {**model_files(4), INDEX: index}, "main")
    assert reason in machine.resolve("hf://org/odd", weights=True)["error"]
    assert machine.hub.fetched() == SMALL_FILES | {INDEX}


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        ({"config.json"}, "holds no config.json; a model in Hugging Face layout has one"),
        ({"tokenizer.json"}, "holds no tokenizer (tokenizer.json, tokenizer.model, or vocab.json and merges.txt)"),
    ],
)
def test_a_repository_that_is_no_model(lacking: set[str], reason: str, machine: Machine) -> None:
    files = {name: content for name, content in model_files(4).items() if name not in lacking}
    commit = machine.hub.publish("org/odd", files, "main")
    error = machine.resolve("hf://org/odd")["error"]
    assert error == f"model.source (hf://org/odd): commit {commit[:12]} {reason}"
    assert machine.hub.fetched() == set()


def test_a_single_file_of_weights_is_all_that_is_fetched(machine: Machine) -> None:
    files = {name: content for name, content in model_files(4).items() if name not in WEIGHT_FILES}
    machine.hub.publish("org/single", {**files, "model.safetensors": b"weights"}, "main")
    machine.resolve("hf://org/single", weights=True)
    assert machine.hub.fetched() == SMALL_FILES | {"model.safetensors"}


class LyingHub(Hub):
    """Refuse a Hub that returns another commit than requested."""

    lies = ""

    def commit_of(self, repository: str, revision: str) -> str | None:
        return self.lies or super().commit_of(repository, revision)


def test_a_mirror_that_answers_with_another_commit(tmp_path: Path) -> None:
    hub = LyingHub(tmp_path / "hub")
    with hub:
        commits = [hub.publish("org/tiny", model_files(size), "main") for size in (1, 2)]
        hub.lies = commits[1]
        error = Machine(tmp_path / "home", hub, "", "", "").resolve(f"hf://org/tiny@{commits[0]}")["error"]
        assert f"the Hub answered with commit {commits[1]}; check model.endpoint" in error
