"""The download of one file of the Hub over plain HTTP, resuming a partial file.

huggingface_hub 1.33 and 2.x delete the partial file of a stopped process, and lose up to 10 MiB at each interruption
within a process; 0.36 resumes. Its session and its backoff for a busy server are used.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from qwen_cl.models.hub.http_errors import request_errors, status_of

RETRY_AFTER = 1.0
"""Seconds before a retry."""
BLOCK = 10 * 2**20
"""Bytes kept in memory before they are written, as huggingface_hub does."""
PIECE = 64 * 2**10
BUSY = (429, 500, 502, 503, 504)
INTERRUPTIONS = 2
"""Most connections that end during a transfer."""
SILENCES = 5
"""Most attempts in a row without any data."""


class Interrupted(Exception):
    """The error of a download that was interrupted, or received no data, too often."""


def receive(url: str, path: Path, size: int | None, *, name: str) -> None:
    """Append to ``path`` until it has ``size`` bytes, in as many requests as needed.

    Raises:
        Interrupted: The download is incomplete; the partial file stays.
        OSError: The file cannot be written, or the server refused (huggingface_hub's HTTP errors).
    """
    from huggingface_hub.utils import tqdm

    interruptions = silences = 0
    with tqdm(desc=name, total=size, initial=arrived_bytes(path), unit="B", unit_scale=True, disable=None) as bar:
        while True:
            before = arrived_bytes(path)
            try:
                _receive_rest(url, path, size, bar)
                return
            except request_errors(Interrupted) as error:
                if status_of(error) is not None:
                    raise
                progressed = arrived_bytes(path) > before
                silences = 0 if progressed else silences + 1
                interruptions += progressed and not _timed_out(error)
                if interruptions == INTERRUPTIONS:
                    raise Interrupted("the connection was interrupted twice") from error
                if silences == SILENCES:
                    raise Interrupted(f"no data arrived in {SILENCES} attempts") from error
            time.sleep(RETRY_AFTER)


def _receive_rest(url: str, path: Path, size: int | None, bar: Any) -> None:
    from huggingface_hub.utils import build_hf_headers

    if size is not None and arrived_bytes(path) > size:  # not a part of this file
        path.unlink()
    start = arrived_bytes(path)
    if start == size:
        path.touch()
        return
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with _answer(url, headers) as (status, pieces), path.open("ab") as stream:
        if status != 206:  # the server ignored the range and sends the complete file
            stream.truncate(0)
            bar.update(-start)
        _write(pieces, stream, bar)
    if size is not None and arrived_bytes(path) != size:
        raise Interrupted(f"{arrived_bytes(path)} of {size} bytes arrived")


def _write(pieces: Iterator[bytes], stream: Any, bar: Any) -> None:
    """Write the content in blocks, and the rest even at an interruption."""
    waiting = bytearray()
    try:
        for piece in pieces:
            waiting += piece
            bar.update(len(piece))
            while len(waiting) >= BLOCK:
                stream.write(waiting[:BLOCK])
                stream.flush()
                del waiting[:BLOCK]
    finally:
        stream.write(waiting)


@contextmanager
def _answer(url: str, headers: dict[str, str]) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Yield the status and the content as it arrives, from either HTTP library."""
    from huggingface_hub import constants, utils

    stream: Any = getattr(utils, "http_stream_backoff", None)
    options = {
        "headers": headers,
        "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
        "retry_on_exceptions": (),
        "retry_on_status_codes": BUSY,
    }
    if stream is not None:  # since 1.0
        with stream("GET", url, follow_redirects=True, **options) as response:
            utils.hf_raise_for_status(response)
            yield response.status_code, response.iter_bytes()
        return
    with closing(utils.http_backoff("GET", url, stream=True, **options)) as response:
        utils.hf_raise_for_status(response)
        yield response.status_code, response.iter_content(PIECE)


def arrived_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _timed_out(error: BaseException) -> bool:
    """Return whether an error is a timeout, which requests wraps in a ConnectionError while reading."""
    return any("Timeout" in type(each).__name__ for each in (error, *error.args))
