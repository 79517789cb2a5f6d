"""Builders as processes: killed, interrupted, several at once."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer

from qwen_cl.config.errors import EXIT_INTERRUPTED
from qwen_cl.data.corpus.build import build
from qwen_cl.data.corpus.cache import read_entry
from qwen_cl.data.corpus.prepare import BuildRequest, make_build_request
from tests.support.corpora import json_lines, source

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
PREPARE = """
import sys
from transformers import AutoTokenizer
from qwen_cl.config.errors import EXIT_INTERRUPTED, RunFailed
from qwen_cl.data.corpus.documents import TextSource
from qwen_cl.data.corpus.prepare import prepare_corpus
path, cache = sys.argv[1:]
source = TextSource(key="data.path", path=path, text_field="text", split="train", subset=None)
tokenizer = AutoTokenizer.from_pretrained("qwen_cl/demo/model")
try:
    prepare_corpus(source, tokenizer, 4096, workers=2, cache=cache)
except RunFailed as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    sys.exit(EXIT_INTERRUPTED)
"""
BUILD = """
import sys
from qwen_cl.data.corpus import tokenizer_pool
from qwen_cl.data.corpus.worker import main
from tests.support import corpora
if __name__ == "__main__":
    tokenizer_pool.encode_texts = corpora.die_while_answering
    sys.exit(main())
"""
STOPPED = ("interrupted", "killed", "builder", "worker")
DOCUMENTS = 10_000
DEADLINE = 300
"""Seconds after which a process that should have done something never will."""
FORK = multiprocessing.get_context("fork")  # importing Megatron is most of what a builder's start takes


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes a second or more to tokenize: long enough to be met in the middle of it."""
    path = tmp_path_factory.mktemp("text") / "long.jsonl"
    path.write_bytes(json_lines([f"{number} " + "日本語 and English. " * 40 for number in range(DOCUMENTS)]))
    return path


def wait_until_tokenizing(cache: Path, alive: Callable[[], bool]) -> None:
    """Wait until the first tokens are on disk."""
    end = time.monotonic() + DEADLINE
    while not any(path.stat().st_size for path in cache.glob("*.unfinished/corpus.bin")):
        assert alive()
        assert time.monotonic() < end
        time.sleep(0.01)


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=DEADLINE)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def entries(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def build_alone(request: BuildRequest, log: Path) -> None:
    with log.open("w", encoding="utf-8") as stream, redirect_stderr(stream):
        build(request)


def test_a_killed_builder_is_made_good_by_one_of_two_that_start_at_once(text: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "qwen_cl/demo/model"))
    request = make_build_request(source(text), tokenizer, workers=2, cache=str(cache))
    killed = FORK.Process(target=build_alone, args=(request, tmp_path / "killed"))
    killed.start()
    wait_until_tokenizing(cache, killed.is_alive)
    family = psutil.Process(killed.pid).children(recursive=True)
    assert len(family) >= 2
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert gone(family)
    assert entries(cache) == [f"{Path(request.entry).name}.unfinished"]
    assert read_entry(Path(request.entry), None) is None

    logs = [tmp_path / "first", tmp_path / "second"]
    both = [FORK.Process(target=build_alone, args=(request, log)) for log in logs]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    tokenized, waited = sorted((log.read_text(encoding="utf-8") for log in logs), key=len, reverse=True)
    assert tokenized.startswith("Tokenizing ")
    assert f"{DOCUMENTS:,} documents, " in tokenized
    assert waited in ("", "Another run is tokenizing this text; waiting for it\n")
    corpus = read_entry(Path(request.entry), None)
    assert corpus is not None
    assert corpus.counts.documents == DOCUMENTS
    assert entries(cache) == [Path(request.entry).name]


def prepare(path: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(path), str(cache)],
        cwd=ROOT,
        env={**os.environ, "USE_TORCH": "0", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def builder_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The builder, and all that it started."""
    (builder,) = psutil.Process(launcher.pid).children()
    assert builder.cmdline()[-1] == "qwen_cl.data.corpus.worker"
    return [builder, *builder.children(recursive=True)]


def test_whatever_stops_a_launcher_leaves_nothing(text: Path, tmp_path: Path) -> None:
    """Start all at once, as each waits for Megatron to be imported."""
    caches = {name: tmp_path / name for name in STOPPED}
    launchers = {name: prepare(text, cache) for name, cache in caches.items()}
    families = {}
    for name in STOPPED:
        launcher = launchers[name]
        wait_until_tokenizing(caches[name], lambda launcher=launcher: launcher.poll() is None)  # type: ignore[misc]
        families[name] = family = builder_of(launcher)
        workers = [process for process in family[1:] if "spawn_main" in " ".join(process.cmdline())]
        {
            "interrupted": functools.partial(launcher.send_signal, signal.SIGINT),
            "killed": launcher.kill,
            "builder": family[0].kill,
            "worker": workers[0].kill,
        }[name]()
    outputs = {name: launcher.communicate(timeout=DEADLINE) for name, launcher in launchers.items()}
    codes = {name: launcher.returncode for name, launcher in launchers.items()}
    assert codes == {"interrupted": EXIT_INTERRUPTED, "killed": -signal.SIGKILL, "builder": 1, "worker": 1}
    assert {name: gone(family) for name, family in families.items()} == dict.fromkeys(families, True)
    for name, reason in (
        ("builder", "the tokenizing process was killed by SIGKILL"),
        ("worker", "a tokenizing process was killed (out of memory?); lower data.workers"),
    ):
        assert outputs[name][1].splitlines()[-1] == f"data.path ({text}): {reason}"
    left = {name: [entry.partition(".")[2] for entry in entries(cache)] for name, cache in caches.items()}
    assert left == {"interrupted": [], "killed": [], "builder": ["unfinished"], "worker": []}


def test_a_worker_that_is_killed_in_the_middle_of_its_answer_is_missed(text: Path, tmp_path: Path) -> None:
    """The pool itself waits for the rest of it, for ever."""
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "qwen_cl/demo/model"))
    request = make_build_request(source(text), tokenizer, workers=2, cache=str(tmp_path / "cache"))
    program = tmp_path / "build.py"
    program.write_text(BUILD)
    with subprocess.Popen(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as builder:
        assert builder.stdin is not None and builder.stdout is not None
        builder.stdin.write(json.dumps(asdict(request)) + "\n")
        builder.stdin.flush()
        assert "a tokenizing process was killed" in builder.stdout.readline()
        assert builder.wait(timeout=DEADLINE) == 1
    assert entries(tmp_path / "cache") == []
