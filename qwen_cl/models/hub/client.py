"""The pinning of a model on the Hub, or a mirror of it, to a commit, and the download and verification of its files.

A commit whose files were all verified before needs no request. If the Hub may not or cannot be asked, the cache is used
if it is complete. Otherwise one request lists the files of the commit, and missing ones are downloaded.
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
RETRIABLE = (None, 429, 500, 502, 503, 504)
"""HTTP status codes worth a second request; None stands for no response."""
USE_LOCAL = "or copy the model to a directory and write model=local model.source=DIRECTORY"


@dataclass(eq=False)
class HubUnavailable(Exception):
    """The reason why the Hub is not asked or does not answer, and the fix."""

    why: str
    fix: str


OFFLINE = HubUnavailable("model.offline or HF_HUB_OFFLINE forbids asking the Hub", "allow it once")


def hub_unreachable(reason: str) -> HubUnavailable:
    return HubUnavailable(f"the Hub did not answer ({reason})", "check the network and model.endpoint or HF_ENDPOINT")


def fetch_snapshot(repo: str, revision: str | None, settings: HubSettings, *, weights: bool) -> Snapshot:
    """Return the snapshot of a repository in the cache, downloaded and verified.

    Raises:
        UserError: The Hub refuses or cannot be reached, or the files are incomplete or damaged.
    """
    reference = f"hf://{repo}" + (f"@{revision}" if revision else "")
    cached = _from_cache(reference, repo, revision, settings.cache_directory)
    if settings.is_offline:
        return _use_cached(cached, reference, settings, OFFLINE, weights=weights)
    if cached and cached.commit == revision and cached.manifest and _is_ready(cached, weights=weights):
        return cached
    try:
        manifest = _request_manifest(reference, repo, revision, settings.url)
    except HubUnavailable as unavailable:
        snapshot = _use_cached(cached, reference, settings, unavailable, weights=weights)
        print(f"{reference} is commit {snapshot.commit} of the cache: {unavailable.why}", file=sys.stderr)
        return snapshot
    snapshot = Snapshot(reference, repo, manifest.commit, settings.cache_directory, manifest)
    write_model_manifest(snapshot.repository, manifest)
    if not _is_ready(snapshot, weights=weights):
        with _quiet(), _repository_lock(snapshot):
            _complete(snapshot, lambda names: _obtain(snapshot, names, settings.url), weights=weights)
    if revision != snapshot.commit:  # for offline use, in the place where huggingface_hub looks
        write_if_possible(snapshot.repository / "refs" / (revision or "main"), snapshot.commit)
    return snapshot


def cached_directory(repo: str, revision: str | None) -> Path:
    """Return the directory of the snapshot in huggingface_hub's cache, without checks or requests.

    Raises:
        FileNotFoundError: The snapshot is not in the cache.
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
    """Return the commit to which the revision last resolved, if its folder is in the cache.

    snapshot_download is no alternative: since 1.33 it ignores a snapshot that lacks any file of the repository.
    """
    repository = Snapshot("", repo, "", cache, None).repository
    commit = revision or "main"
    if not COMMIT.fullmatch(commit):
        try:
            commit = (repository / "refs" / commit).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
    return commit if COMMIT.fullmatch(commit) and (repository / "snapshots" / commit).is_dir() else None


def _use_cached(
    cached: Snapshot | None, reference: str, settings: HubSettings, unavailable: HubUnavailable, *, weights: bool
) -> Snapshot:
    """Return the cached snapshot if it is complete and undamaged."""
    if cached is None:
        raise UserError(
            f"model.source ({reference}) is not in the cache ({settings.cache_directory}), and {unavailable.why}; "
            f"{unavailable.fix}, {USE_LOCAL}"
        )
    _complete(cached, lambda names: _require_sound(cached, names, unavailable), weights=weights)
    return cached


def _require_sound(cached: Snapshot, names: list[str], unavailable: HubUnavailable) -> None:
    for name in names:
        if not (cached.directory / name).exists():
            raise UserError(
                f"model.source ({cached.reference}): the cache ({cached.cache}) lacks {name} of commit "
                f"{cached.commit[:12]}, and {unavailable.why}; {unavailable.fix}, {USE_LOCAL}"
            )
    for name in damaged_files(cached, names):
        raise UserError(
            f"model.source ({cached.reference}): {name} in the cache is damaged, and {unavailable.why}; remove "
            f"{cached.blob(name)} and {unavailable.fix}"
        )


def _complete(snapshot: Snapshot, obtain: Callable[[list[str]], None], *, weights: bool) -> None:
    """Obtain all needed files in rounds, as the index that lists the weight files must be obtained first."""
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
            f"model.source ({snapshot.reference}): {still[0]} was damaged in both downloads from the Hub: its content "
            f"is not that of commit {snapshot.commit[:12]}; try later, or another model.endpoint"
        )


def _request_manifest(reference: str, repo: str, revision: str | None, endpoint: str | None) -> ModelManifest:
    """Return the manifest of the reference's current commit, in one request; retry once on a temporary error."""
    for last in (False, True):
        try:
            manifest = from_hub(_model_info(repo, revision, endpoint))
            break
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # the response is not JSON, or not a Hub's
            raise refusal(error, reference) or hub_unreachable("the response is not that of a Hub") from error
        except request_errors() as error:
            if refused := refusal(error, reference):
                raise refused from error
            if last or status_of(error) not in RETRIABLE:
                raise hub_unreachable(reason_of(error)) from error
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
def _repository_lock(snapshot: Snapshot) -> Iterator[None]:
    """Lock a repository, so that one process downloads and verifies it while the others wait.

    A read-only cache needs no lock.
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
    """Silence huggingface_hub's warnings, whose URLs may be signed; our own messages say what matters in them."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
