"""Process that builds one corpus: ``python -m qwen_cl.data.corpus.worker``, started by ``data.corpus.prepare``.

Its workers import this module again, so at its top it imports little.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from typing import Any

from qwen_cl.config.errors import EXIT_INTERRUPTED, RunFailed, UserError
from qwen_cl.data.corpus.build import build
from qwen_cl.data.corpus.prepare import BuildRequest
from qwen_cl.data.corpus.tokenizer_pool import PoolStuck


def main() -> int:
    """Build the requested entry. On failure, print one line of JSON with the reason."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    request = BuildRequest.parse(sys.stdin.readline())
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        _import_megatron()
        build(request)
    except UserError as error:
        print(json.dumps(str(error)), flush=True)
        return UserError.exit_code
    except BrokenProcessPool as error:
        print(json.dumps("a tokenizing process was killed (out of memory?); lower data.workers"), flush=True)
        if isinstance(error, PoolStuck):
            sys.stderr.flush()
            os._exit(RunFailed.exit_code)
        return RunFailed.exit_code
    return 0


def _import_megatron() -> None:
    """Import Megatron without library logs on standard error."""
    from qwen_cl.patches.imports import import_megatron

    with redirect_stderr(io.StringIO()):
        import_megatron()


def _stop(number: int, frame: Any) -> None:
    """Exit on the first signal, so that unfinished files are removed, and ignore further ones."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(EXIT_INTERRUPTED)


def _stop_with_parent() -> None:
    """Stop when standard input closes, as the launcher ended. Reads unbuffered, as a lock would block exit."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
