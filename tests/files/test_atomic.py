"""A file appears complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_cl.files.atomic import atomic_write, flush, write_text


def test_what_fails_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "before"
        _ = 1 / 0
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file", "before")]


def test_it_takes_the_files_place_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
        flush(temporary)
        assert not path.exists()
    flush(tmp_path)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file", "whole")]


def test_a_text_is_written_with_the_folder_it_needs_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "text.json"
    write_text(path, "first")
    write_text(path, "二番目\n")
    assert path.read_bytes() == "二番目\n".encode()
    assert list(path.parent.iterdir()) == [path]
