"""Preparation of a corpus: read from the cache, or built by a separate process.

Called by the launcher, which has no torch; the builder has Megatron.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_cl.config.data import DocumentSeparator
from qwen_cl.config.errors import RunFailed, UserError
from qwen_cl.config.paths import ROOT
from qwen_cl.data.corpus.cache import FORMAT_VERSION, Corpus, cache_directory, read_entry
from qwen_cl.data.corpus.documents import TextSource, read_files
from qwen_cl.data.corpus.files import Format, find_files, hash_files, stamps
from qwen_cl.data.corpus.hub_dataset import is_hub_dataset, pin
from qwen_cl.data.corpus.hub_revisions import recall, remember
from qwen_cl.data.raw_text import document_delimiters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILDER = "qwen_cl.data.corpus.worker"
STOP_GRACE = 30
"""Seconds between SIGTERM and SIGKILL for the builder, so that it can clean up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusIdentity:
    """The current content of a source."""

    content: str
    prefix: str | None
    """Prefix of a dataset that is already indexed, and only checked."""
    commit: str | None
    """Commit of a Hub dataset."""
    stamps: list[list[str | int]]
    """Stamps of the files, from before they were hashed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """The request to the builder; plain values, as JSON on its standard input."""

    source: TextSource
    known: CorpusIdentity
    entry: str
    """Directory in the cache."""
    tokenizer: str
    """The text of tokenizer.json."""
    eos_id: int
    bos_id: int | None
    """See ``Delimiters``; only checked in indexed datasets."""
    workers: int

    @classmethod
    def parse(cls, line: str) -> BuildRequest:
        values = json.loads(line)
        source = {**values["source"], "separator": DocumentSeparator(values["source"]["separator"])}
        return cls(**{**values, "source": TextSource(**source), "known": CorpusIdentity(**values["known"])})


def prepare_corpus(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, workers: int | None, cache: str | None
) -> Corpus:
    """Return the tokenized source, after building it if necessary. Shows progress on standard error.

    ``vocab_size`` is the model's. Documents end with the tokenizer's end-of-text. Text is never encoded as a special
    token. BOS is not stored, but added to each document on reading.

    Raises:
        UserError: the source is invalid, or the cache cannot be written to.
        RunFailed: the builder died.
    """
    request = make_build_request(source, tokenizer, workers=workers, cache=cache)
    entry, prefix = Path(request.entry), request.known.prefix
    corpus = read_entry(entry, prefix)
    if corpus is None:
        _build(request)
        corpus = read_entry(entry, prefix)
    if corpus is None:
        raise RunFailed(
            f"{source.key} ({source.path}): the tokenized text was removed from {entry}; run the command again"
        )
    if corpus.counts.largest_id >= vocab_size:
        raise UserError(
            f"{source.key} ({source.path}) has token id {corpus.counts.largest_id}, past the model's vocab_size "
            f"({vocab_size}); index it with this model's tokenizer, or give the text itself"
        )
    return corpus


def source_content(source: TextSource, *, cache: str | None) -> str:
    """Return the current ``Corpus.content`` of a source, without tokenizing."""
    return _identify(source, cache_directory(cache)).content


def locate_document(source: TextSource, number: int) -> str:
    """Return the FILE:LINE of a document of the corpus, by its index there, or its number in other sources. Reads the
    source again."""
    if indexed_prefix(source.path) is None and not is_hub_dataset(source.path):
        documents = read_files(find_files(source.path, source.key), source.text_field, source.separator)
        with_text = (document.where for document in documents if document.text)
        if (where := next(itertools.islice(with_text, number, None), None)) is not None:
            return where
    return f"{source.path}, document {number + 1}"


def make_build_request(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, *, workers: int | None, cache: str | None
) -> BuildRequest:
    """Identify the source, and return the request for its cache entry."""
    root = cache_directory(cache)
    known = _identify(source, root)
    rules, delimiters = _tokenizer_rules(tokenizer), document_delimiters(tokenizer)
    parts = [FORMAT_VERSION, known.content, source.text_field, known.prefix is None, rules, delimiters.eos_id]
    if known.prefix is not None and delimiters.bos_id is not None:
        parts.append(delimiters.bos_id)
    if source.separator is not DocumentSeparator.file and has_text_files(source.path, source.key):
        parts.append(source.separator.value)
    return BuildRequest(
        source=source,
        known=known,
        entry=str(root / _hash(*parts)),
        tokenizer=rules,
        eos_id=delimiters.eos_id,
        bos_id=delimiters.bos_id,
        workers=workers or os.cpu_count() or 1,
    )


def has_text_files(path: str, key: str) -> bool:
    """Return True if the path has text files. Raises UserError if it does not exist."""
    if indexed_prefix(path) is not None or is_hub_dataset(path):
        return False
    return any(file.format is Format.text for file in find_files(path, key))


def _identify(source: TextSource, root: Path) -> CorpusIdentity:
    prefix = indexed_prefix(source.path)
    if prefix is not None:
        content = hash_files([Path(f"{prefix}.bin"), Path(f"{prefix}.idx")])
        return CorpusIdentity(content=content, prefix=prefix, commit=None, stamps=[])
    if is_hub_dataset(source.path):
        commit = recall(root, source) or pin(source)
        remember(root, source, commit)
        content = _hash("hub", source.path.partition("@")[0], commit, source.subset, source.split)
        return CorpusIdentity(content=content, prefix=None, commit=commit, stamps=[])
    files = find_files(source.path, source.key)
    before = stamps(files)
    kinds = [f"{file.format.value} {file.compression}" for file in files]
    content = _hash(*kinds, hash_files([file.path for file in files]))
    return CorpusIdentity(content=content, prefix=None, commit=None, stamps=before)


def indexed_prefix(path: str) -> str | None:
    """Return the absolute prefix if ``path`` is a pair of Megatron files, with or without suffix; else None."""
    stem = os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111
    if stem.endswith((".bin", ".idx")):
        stem = stem[:-4]
    return stem if all(Path(f"{stem}{suffix}").is_file() for suffix in (".bin", ".idx")) else None


def _tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of tokenizer.json, without truncation and padding that a caller may have set."""
    from tokenizers import Tokenizer

    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer has no tokenizer.json, which raw text is read with")
    rules = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rules.no_truncation()
    rules.no_padding()
    return str(rules.to_str())


def _hash(*values: object) -> str:
    return hashlib.sha256(json.dumps([str(value) for value in values]).encode()).hexdigest()


def _build(request: BuildRequest) -> None:
    """Run the builder. Its standard input closes when this process ends, which stops it."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}  # the processes are parallel already
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    with _terminated_on_exit(
        subprocess.Popen(
            [sys.executable, "-m", BUILDER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process, which stops the builder
            text=True,
            encoding="utf-8",
        )
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(request)) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; see its return code
        answer = process.stdout.readline()
        process.wait()
    if process.returncode == UserError.exit_code:
        raise UserError(json.loads(answer))
    if process.returncode:
        killed = f"killed by {signal.Signals(-process.returncode).name}" if process.returncode < 0 else "interrupted"
        reason = json.loads(answer) if answer else f"the tokenizing process was {killed}"
        raise RunFailed(f"{request.source.key} ({request.source.path}): {reason}")


@contextmanager
def _terminated_on_exit(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # unread input
                pipe.close()
