"""A reference to a model on the Hub, or a mirror of it, pinned to a commit whose files are here and are its own.

Three ways, the cheapest first: a commit whose files were all verified before asks nothing; what may not or cannot be
asked for is taken from the cache if it is whole there; else one request says what the commit holds, and what is
missing is fetched.
"""

from __future__ import annotations

import errno
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.models.hub.download import download
from qwen_cl.models.hub.errors import refusal
from qwen_cl.models.hub.http_errors import reason_of, request_errors, status_of
from qwen_cl.models.hub.http_file import RETRY_AFTER
from qwen_cl.models.hub.manifest import ModelManifest, from_hub, read_manifest, write_if_possible, write_model_manifest
from qwen_cl.models.hub.settings import HubSettings
from qwen_cl.models.hub.snapshot import Snapshot, damaged_files, is_verified, needed_files, remove

COMMIT = re.compile(r"[0-9a-f]{40}")
MAY_PASS = (None, 429, 500, 502, 503, 504)
"""HTTP status of trouble worth a second request; None where there was no answer at all."""
ELSEWHERE = "or copy the model to a directory and write model=local model.source=DIRECTORY"


@dataclass(eq=False)
class HubUnavailable(Exception):
    """Why the Hub has no say, and what the user can do about that."""

    why: str
    fix: str


OFFLINE = HubUnavailable("model.offline or HF_HUB_OFFLINE forbids asking the Hub", "allow it once")


def no_answer(how: str) -> HubUnavailable:
    return HubUnavailable(f"the Hub did not answer ({how})", "check the network and model.endpoint or HF_ENDPOINT")


def fetch_snapshot(repo: str, revision: str | None, settings: HubSettings, *, weights: bool) -> Snapshot:
    """Raises UserError: refused, out of reach, incomplete or damaged, with what to do."""
    reference = f"hf://{repo}" + (f"@{revision}" if revision else "")
    cached = _from_cache(reference, repo, revision, settings.cache_directory)
    if settings.may_not_ask:
        return _as_it_is(cached, reference, settings, OFFLINE, weights=weights)
    if cached and cached.commit == revision and cached.manifest and _is_ready(cached, weights=weights):
        return cached
    try:
        manifest = _ask(reference, repo, revision, settings.url)
    except HubUnavailable as unasked:
        snapshot = _as_it_is(cached, reference, settings, unasked, weights=weights)
        print(f"{reference} is commit {snapshot.commit} of the cache: {unasked.why}", file=sys.stderr)
        return snapshot
    snapshot = Snapshot(reference, repo, manifest.commit, settings.cache_directory, manifest)
    write_model_manifest(snapshot.repository, manifest)
    if not _is_ready(snapshot, weights=weights):
        with _quiet(), _alone(snapshot):
            _complete(snapshot, lambda names: _obtain(snapshot, names, settings.url), weights=weights)
    if revision != snapshot.commit:  # for a day without a Hub, where huggingface_hub itself looks
        write_if_possible(snapshot.repository / "refs" / (revision or "main"), snapshot.commit)
    return snapshot


def cached_directory(repo: str, revision: str | None) -> Path:
    """Return where huggingface_hub keeps the snapshot; nothing is checked and nothing asked.

    Raises:
        FileNotFoundError: the cache has none.
    """
    cache = HubSettings().cache_directory
    commit = _commit_in_cache(cache, repo, revision)
    if commit is None:
        raise FileNotFoundError(errno.ENOENT, f"hf://{repo}@{revision} is not in the cache", str(cache))
    return Snapshot("", repo, commit, cache, None).directory


def _from_cache(reference: str, repo: str, revision: str | None, cache: Path) -> Snapshot | None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"model.source ({reference}): {error}") from error
    commit = _commit_in_cache(cache, repo, revision)
    if commit is None:
        return None
    snapshot = Snapshot(reference, repo, commit, cache, None)
    return replace(snapshot, manifest=read_manifest(snapshot.repository, commit))


def _commit_in_cache(cache: Path, repo: str, revision: str | None) -> str | None:
    """Return what the revision meant when it was last asked for, if that commit's folder is there.

    Not by snapshot_download: since 1.33 it takes a snapshot without every file of the repository for none.
    """
    repository = Snapshot("", repo, "", cache, None).repository
    commit = revision or "main"
    if not COMMIT.fullmatch(commit):
        try:
            commit = (repository / "refs" / commit).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
    return commit if COMMIT.fullmatch(commit) and (repository / "snapshots" / commit).is_dir() else None


def _as_it_is(
    cached: Snapshot | None, reference: str, settings: HubSettings, unasked: HubUnavailable, *, weights: bool
) -> Snapshot:
    """The snapshot of the cache, where that is whole and undamaged."""
    if cached is None:
        raise UserError(
            f"model.source ({reference}) is not in the cache ({settings.cache_directory}), and {unasked.why}; "
            f"{unasked.fix}, {ELSEWHERE}"
        )
    _complete(cached, lambda names: _require_sound(cached, names, unasked), weights=weights)
    return cached


def _require_sound(cached: Snapshot, names: list[str], unasked: HubUnavailable) -> None:
    for name in names:
        if not (cached.directory / name).exists():
            raise UserError(
                f"model.source ({cached.reference}): the cache ({cached.cache}) lacks {name} of commit "
                f"{cached.commit[:12]}, and {unasked.why}; {unasked.fix}, {ELSEWHERE}"
            )
    for name in damaged_files(cached, names):
        raise UserError(
            f"model.source ({cached.reference}): {name} in the cache is damaged, and {unasked.why}; remove "
            f"{cached.blob(name)} and {unasked.fix}"
        )


def _complete(snapshot: Snapshot, obtain: Callable[[list[str]], None], *, weights: bool) -> None:
    """In rounds: which weights there are stands in the index, which has to be obtained first."""
    done: set[str] = set()
    while todo := [
        name for name in needed_files(snapshot, weights=weights, trusted=done.__contains__) if name not in done
    ]:
        obtain(todo)
        done.update(todo)


def _is_ready(snapshot: Snapshot, *, weights: bool) -> bool:
    def verified(name: str) -> bool:
        return is_verified(snapshot, name)

    return all(map(verified, needed_files(snapshot, weights=weights, trusted=verified)))


def _obtain(snapshot: Snapshot, names: list[str], endpoint: str | None) -> None:
    if missing := [name for name in names if not (snapshot.directory / name).exists()]:
        download(snapshot, missing, endpoint)
    if not (damaged := damaged_files(snapshot, names)):
        return
    for name in damaged:
        where = f"{name} of {snapshot.reference} is damaged in the cache ({snapshot.blob(name)})"
        print(f"{where}: fetching it again", file=sys.stderr)
        remove(snapshot, name)
    download(snapshot, damaged, endpoint)
    if still := damaged_files(snapshot, damaged):
        for name in still:
            remove(snapshot, name)
        raise UserError(
            f"model.source ({snapshot.reference}): {still[0]} came damaged from the Hub, twice: its content is not "
            f"what commit {snapshot.commit[:12]} holds; try later, or another model.endpoint"
        )


def _ask(reference: str, repo: str, revision: str | None, endpoint: str | None) -> ModelManifest:
    """What the reference stands for now, in one request; a second one where the first met trouble that may pass."""
    for last in (False, True):
        try:
            manifest = from_hub(_model_info(repo, revision, endpoint))
            break
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # no JSON, or none of a Hub's
            raise refusal(error, reference) or no_answer("what answers there is no Hub") from error
        except request_errors() as error:
            if refused := refusal(error, reference):
                raise refused from error
            if last or status_of(error) not in MAY_PASS:
                raise no_answer(reason_of(error)) from error
            time.sleep(RETRY_AFTER)
    pinned = COMMIT.fullmatch(revision or "")
    if not COMMIT.fullmatch(manifest.commit or "") or (pinned and manifest.commit != revision):
        raise UserError(
            f"model.source ({reference}): the Hub answered with commit {manifest.commit}; check model.endpoint"
        )
    return manifest


def _model_info(repo: str, revision: str | None, endpoint: str | None) -> Any:
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=endpoint)
    return api.model_info(repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)


@contextmanager
def _alone(snapshot: Snapshot) -> Iterator[None]:
    """One process at a time fetches and verifies a repository; the others wait and find it done.

    In a cache that cannot be written to there is nothing to guard.
    """
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    path = snapshot.cache / ".locks" / snapshot.repository.name / "qwen_cl.lock"
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(WeakFileLock(path, timeout=1))
            except Timeout:
                print(f"Waiting for another process that fetches {snapshot.reference}", file=sys.stderr, flush=True)
                stack.enter_context(WeakFileLock(path))
        except OSError:
            pass
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """huggingface_hub's warnings hold URLs, which can be signed; what matters of them is in our own messages."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
