"""The download of a commit's missing files to the Hub's cache, laid out and locked as in huggingface_hub."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from rich.filesize import decimal

from qwen_cl.config.errors import UserError
from qwen_cl.files.parallel import for_each
from qwen_cl.models.hub.errors import refusal
from qwen_cl.models.hub.http_errors import reason_of, request_errors
from qwen_cl.models.hub.http_file import Interrupted, arrived_bytes, receive
from qwen_cl.models.hub.snapshot import Snapshot


def download(snapshot: Snapshot, names: list[str], endpoint: str | None) -> None:
    """Download files of a commit; partial files stay in the cache and are resumed.

    Raises:
        UserError: The disk is too full, the Hub refuses, or the connection was interrupted twice.
    """
    wanted = _bytes_to_fetch(snapshot, names)
    _require_space(snapshot, wanted)
    if not sys.stderr.isatty():  # on a terminal, huggingface_hub draws progress bars
        files = f"{len(names)} file" + ("s" if len(names) > 1 else "")
        print(f"Fetching {files} ({decimal(wanted)}) of {snapshot.reference}", file=sys.stderr, flush=True)
    for_each(lambda name: _fetch(snapshot, name, endpoint), names)


def _fetch(snapshot: Snapshot, name: str, endpoint: str | None) -> None:
    from huggingface_hub import errors

    try:
        _fetch_file(snapshot, name, endpoint)
    except Interrupted as error:
        raise _download_error(snapshot, name, str(error)) from error
    except request_errors(errors.LocalEntryNotFoundError, errors.FileMetadataError) as error:
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
        no_hub = isinstance(cause, errors.FileMetadataError)
        reason = "the response is not that of a Hub" if no_hub else reason_of(cause)
        raise refusal(cause, snapshot.reference) or _download_error(snapshot, name, reason) from error
    except OSError as error:
        if error.errno is None:  # "Consistency check failed": fewer bytes arrived than announced
            raise _download_error(snapshot, name, "the connection was interrupted") from error
        raise UserError(
            f"model.cache ({snapshot.cache}): {name} cannot be written: {error.strerror}; free disk space, or set "
            "another directory"
        ) from error
    except (ValueError, RuntimeError) as error:  # what hf_transfer and hf_xet raise
        raise _download_error(snapshot, name, str(error).split("\n", 1)[0].rstrip(".")) from error


def _fetch_file(snapshot: Snapshot, name: str, endpoint: str | None) -> None:
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import is_xet_available
    from huggingface_hub.utils import WeakFileLock

    url = hf_hub_url(snapshot.repo, name, revision=snapshot.commit, endpoint=endpoint)
    file = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, endpoint=endpoint)
    if (file.xet_file_data and is_xet_available()) or getattr(constants, "HF_HUB_ENABLE_HF_TRANSFER", False):
        # These download many chunks of a file at once.
        hf_hub_download(snapshot.repo, name, revision=snapshot.commit, cache_dir=str(snapshot.cache), endpoint=endpoint)
        return
    if file.commit_hash is None or file.etag is None or Path(file.etag).name != file.etag:
        raise errors.FileMetadataError(f"{url} has no commit or ETag")
    blob = snapshot.repository / "blobs" / file.etag
    lock = snapshot.cache / ".locks" / snapshot.repository.name / f"{file.etag}.lock"
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # huggingface_hub's lock, for any other process that downloads this file
        if not blob.exists():
            receive(url, _partial(blob), file.size, name=name)
            _partial(blob).replace(blob)
        _link(snapshot.directory / name, blob)


def _link(path: Path, blob: Path) -> None:
    """Make the snapshot's entry as huggingface_hub does: a link, or the file itself where links are not possible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except FileExistsError:  # another process was faster
        return
    except OSError:
        blob.replace(path)


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _download_error(snapshot: Snapshot, name: str, reason: str) -> UserError:
    return UserError(
        f"model.source ({snapshot.reference}): {name} could not be fetched: {reason}; downloaded data is kept in "
        f"{snapshot.cache}, and the same command resumes the download"
    )


def _bytes_to_fetch(snapshot: Snapshot, names: list[str]) -> int:
    """Return the bytes to download, without files of other commits in the cache and partial downloads."""
    total = 0
    for name in names:
        blob = snapshot.repository / "blobs" / (snapshot.digest(name) or "-")
        if not blob.exists():
            total += max(0, (snapshot.size(name) or 0) - arrived_bytes(_partial(blob)))
    return total


def _require_space(snapshot: Snapshot, wanted: int) -> None:
    free = shutil.disk_usage(next(path for path in (snapshot.cache, *snapshot.cache.parents) if path.exists())).free
    if wanted > free:
        raise UserError(
            f"model.cache ({snapshot.cache}): {snapshot.reference} needs {decimal(wanted)} more and "
            f"{decimal(free)} are free; free some, or name a directory on another disk"
        )
