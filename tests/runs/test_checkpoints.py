"""Checkpoints are pruned by rule, the latest valid one is found, and none is ever partial under its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_cl.runs.checkpoints import (
    clear_leftovers,
    complete_checkpoints,
    latest_valid_checkpoint,
    partial_path,
    prune,
    publish,
    remove,
    size_of,
)
from qwen_cl.runs.manifest import (
    CheckpointManifest,
    DamagedCheckpointError,
    SavedFile,
    file_names,
    hash_files,
    verify,
    write_checkpoint_manifest,
)


def save(directory: Path, step: int, val_loss: float | None = None, content: bytes = b"weights") -> Path:
    partial = partial_path(directory, step)
    (partial / "weights").mkdir(parents=True)
    (partial / "weights/a.distcp").write_bytes(content)
    (partial / "weights/.metadata").write_bytes(b"")
    names = file_names(partial)
    hashes = hash_files(partial, names)
    files = {name: SavedFile((partial / name).stat().st_size, hashes[name]) for name in names}
    write_checkpoint_manifest(partial, CheckpointManifest(step, val_loss, files))
    final = directory / f"step={step}"
    publish(partial, final)
    return final


def steps(directory: Path) -> list[int]:
    return [checkpoint.step for checkpoint in complete_checkpoints(directory)]


def test_a_manifest_has_every_file_with_its_size_and_sha256(tmp_path: Path) -> None:
    manifest = verify(save(tmp_path, 7, 1.5))
    assert manifest == CheckpointManifest(
        7,
        1.5,
        {
            "weights/.metadata": SavedFile(0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
            "weights/a.distcp": SavedFile(7, "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"),
        },
    )
    assert size_of(tmp_path) == 7


@pytest.mark.parametrize(
    ("losses", "keep_last", "keep_best", "kept"),
    [
        ({1: 3.0, 2: 2.0, 3: 1.0, 4: 2.5}, 1, 0, [4]),
        ({1: 3.0, 2: 2.0, 3: 1.0, 4: 2.5}, 2, 0, [4, 3]),
        ({1: 1.0, 2: 2.0, 3: 3.0, 4: 2.5}, 1, 2, [4, 2, 1]),
        ({1: 1.0, 2: None, 3: None, 4: None}, 1, 1, [4, 1]),
        ({1: None, 2: None}, 5, 1, [2, 1]),
        ({9: 2.0, 10: 1.0, 100: 3.0}, 2, 0, [100, 10]),  # by number, not by name
    ],
)
def test_the_newest_and_the_best_stay(
    losses: dict[int, float | None], keep_last: int, keep_best: int, kept: list[int], tmp_path: Path
) -> None:
    for step, loss in losses.items():
        save(tmp_path, step, loss)
    removed = prune(tmp_path, keep_last, keep_best)
    assert steps(tmp_path) == kept
    assert sorted(checkpoint.step for checkpoint in removed) == sorted(losses.keys() - set(kept))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"step={step}" for step in kept)


def test_pruning_leaves_what_it_does_not_know(tmp_path: Path) -> None:
    """Check that an incomplete one is neither counted as the latest nor removed."""
    save(tmp_path, 1)
    for name in ("step=2", ".saving-step=3", "step=x", "damaged-step=4"):
        (tmp_path / name).mkdir()
    assert prune(tmp_path, 1, 0) == []
    assert steps(tmp_path) == [1]
    assert len(list(tmp_path.iterdir())) == 5
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step=4", "step=1", "step=2", "step=x"]


def test_a_step_that_is_saved_again_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    save(tmp_path, 5, content=b"old")
    final = save(tmp_path, 5, content=b"newer")
    assert (final / "weights/a.distcp").read_bytes() == b"newer"
    verify(final)
    assert [path.name for path in tmp_path.iterdir()] == ["step=5"]
    remove(final)
    assert list(tmp_path.iterdir()) == []


def test_the_newest_good_one_is_found_behind_those_that_are_not(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    (tmp_path / "step=8/weights/a.distcp").write_bytes(b"weightS")
    (tmp_path / "step=6/manifest.json").write_text("{")
    (tmp_path / "step=4").rename(tmp_path / "step=5")  # says that it is another step's
    found, damaged = latest_valid_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 2
    assert [(checkpoint.step, reason.partition(" (")[0]) for checkpoint, reason in damaged] == [
        (8, "weights/a.distcp does not match its checksum"),
        (6, "manifest.json cannot be read"),
        (5, "manifest.json is of step 4"),
    ]
    assert latest_valid_checkpoint(tmp_path / "nothing") == (None, [])


def test_a_link_is_no_file_of_a_checkpoint(tmp_path: Path) -> None:
    final = save(tmp_path, 1)
    (final / "weights/a.distcp").rename(tmp_path / "elsewhere")
    (final / "weights/a.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpointError, match=r"weights/a\.distcp is missing"):
        verify(final)
