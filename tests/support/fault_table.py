"""The table of docs/faults.md, written by the tests that inject the faults with ``pytest --write-faults``.

This pytest plugin, loaded by conftest.py, attaches a test's description of its fault to its report.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TABLE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
FAULT = "fault"
"""The property in a test's report."""
HEAD = """# Failure modes and recovery

Each line is a test that passed: it injects the fault into real processes, with real signals and files, on a CPU.
Written by `pytest --write-faults`; every run of the tests compares what it saw with it.

| fault | what happens | what is lost |
|---|---|---|
"""
Row = Callable[[str, str, str], None]
_rows: set[tuple[str, str, str]] = set()


@pytest.fixture
def row(record_property: Callable[[str, object], None]) -> Row:
    """Record a fault, its outcome and the loss, at the end of a test that injects it."""
    return lambda fault, happened, lost: record_property(FAULT, (fault, happened, lost))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-faults", action="store_true", help="write docs/faults.md from the tests that ran")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        found: list[Any] = [value for name, value in report.user_properties if name == FAULT]
        _rows.update(map(tuple, found))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # only the main process has all reports
        return
    if session.config.getoption("--write-faults"):
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(HEAD + "".join(map(_line, sorted(_rows))), encoding="utf-8")
        return
    written = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    if missing := [line for line in map(_line, sorted(_rows)) if line not in written]:
        print(
            f"\ndocs/faults.md does not have what the tests saw; pytest --write-faults writes it:\n{''.join(missing)}"
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _line(row: tuple[str, str, str]) -> str:
    return f"| {' | '.join(row)} |\n"
