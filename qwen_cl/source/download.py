"""Missing files of a commit into the Hub's cache, by huggingface_hub, which locks, resumes and places them."""

from __future__ import annotations

import shutil
import sys
import time

from qwen_cl.config.errors import UserError
from qwen_cl.source.failures import how, refusal
from qwen_cl.source.parallel import for_each
from qwen_cl.source.snapshot import Snapshot

RETRY_AFTER = 1.0
"""Seconds."""
UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "bytes": 1}


def download(snapshot: Snapshot, names: list[str], endpoint: str | None) -> None:
    """Raises UserError: no room, or the Hub refused or broke off twice. What arrived stays and is gone on from."""
    wanted = _bytes_to_fetch(snapshot, names)
    _require_space(snapshot, wanted)
    if not sys.stderr.isatty():  # where it is, huggingface_hub draws bars
        files = f"{len(names)} file" + ("s" if len(names) > 1 else "")
        print(f"Fetching {files} ({_in_words(wanted)}) of {snapshot.reference}", file=sys.stderr, flush=True)
    for_each(lambda name: _fetch(snapshot, name, endpoint), names)


def _fetch(snapshot: Snapshot, name: str, endpoint: str | None) -> None:
    """A second try goes on where the first broke off."""
    try:
        _fetch_once(snapshot, name, endpoint)
    except ConnectionBrokenOff:
        time.sleep(RETRY_AFTER)
        try:
            _fetch_once(snapshot, name, endpoint)
        except ConnectionBrokenOff as error:
            raise _gave_up(snapshot, name, "the connection broke off twice") from error


class ConnectionBrokenOff(Exception):
    """While content came; of a server that does not answer at all huggingface_hub has asked five times already."""


def _fetch_once(snapshot: Snapshot, name: str, endpoint: str | None) -> None:
    from huggingface_hub import errors, hf_hub_download
    from requests.exceptions import RequestException

    try:
        hf_hub_download(snapshot.repo, name, revision=snapshot.commit, cache_dir=str(snapshot.cache), endpoint=endpoint)
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        cause = error.__cause__ or error if isinstance(error, errors.LocalEntryNotFoundError) else error
        raise refusal(cause, snapshot.reference) or _gave_up(snapshot, name, how(cause)) from error
    except RequestException as error:
        raise ConnectionBrokenOff from error
    except OSError as error:
        if error.errno is None:  # "Consistency check failed": fewer bytes came than were announced
            raise ConnectionBrokenOff from error
        raise UserError(
            f"model.cache ({snapshot.cache}): {name} cannot be written: {error.strerror}; free space there, or name "
            "another directory"
        ) from error
    except (ValueError, RuntimeError) as error:  # what hf_transfer and hf_xet raise
        raise _gave_up(snapshot, name, str(error).split("\n", 1)[0].rstrip(".")) from error


def _gave_up(snapshot: Snapshot, name: str, reason: str) -> UserError:
    return UserError(
        f"model.source ({snapshot.reference}): {name} could not be fetched: {reason}; what arrived is kept in "
        f"{snapshot.cache}, and the same command goes on from there"
    )


def _bytes_to_fetch(snapshot: Snapshot, names: list[str]) -> int:
    """Less what is there already, whole under another commit or in part."""
    total = 0
    for name in names:
        blob = snapshot.repository / "blobs" / (snapshot.digest(name) or "-")
        partial = blob.with_name(f"{blob.name}.incomplete")
        if not blob.exists():
            arrived = partial.stat().st_size if partial.exists() else 0
            total += max(0, (snapshot.size(name) or 0) - arrived)
    return total


def _require_space(snapshot: Snapshot, wanted: int) -> None:
    free = shutil.disk_usage(next(path for path in (snapshot.cache, *snapshot.cache.parents) if path.exists())).free
    if wanted > free:
        raise UserError(
            f"model.cache ({snapshot.cache}): {snapshot.reference} needs {_in_words(wanted)} more and "
            f"{_in_words(free)} are free; free some, or name a directory on another disk"
        )


def _in_words(count: int) -> str:
    unit, size = next((unit, size) for unit, size in UNITS.items() if count >= size or size == 1)
    return f"{count / size:,.1f} {unit}" if size > 1 else f"{count} {unit}"
