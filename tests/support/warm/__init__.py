"""A warm Python: what the launcher starts as ``python -m`` is forked from a process that has imported NeMo.

NeMo takes ten seconds to import, longer than most runs here. The launcher is an ordinary process with the command of a
user, but its ``sys.executable`` is a script (``tests.support.warm.client``). It requests the process from a server
(``tests.support.warm.server``), passes it arguments, environment, working directory, streams and signals, and ends with
its exit code. The process differs in being nobody's child, in its own session, and in the environment that Python reads
at its start and libraries at their import, which is the server's. So tests of how a run starts, is stopped or is killed
use the real Python."""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tests.support.ranks import start_rank
from tests.support.warm import server

CLIENT = Path(__file__).with_name("client.py")


def warm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a launcher whose runs start warm."""
    path = os.pathsep.join(filter(None, [str(_place()), environment.get("PYTHONPATH")]))
    return {**environment, "PYTHONPATH": path}


@cache
def _place() -> Path:
    """Return a directory with the script and the ``sitecustomize`` that installs it; the server is running."""
    place = Path(tempfile.mkdtemp(prefix="warm-"))
    address = place / "socket"
    python = place / "python"
    command = shlex.join([sys.executable, "-S", "-E", str(CLIENT), str(address), str(python)])
    python.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    python.chmod(0o755)
    (place / "sitecustomize.py").write_text(f"import sys\n\nsys.executable = {str(python)!r}\n")
    (place / "log").touch()
    process = start_rank(server.main, (str(address),), os.environ, place / "log")
    while not address.exists():
        assert process.is_alive(), (place / "log").read_text()
        time.sleep(0.1)

    def end() -> None:
        process.kill()
        process.join()
        shutil.rmtree(place, ignore_errors=True)

    atexit.register(end)
    return place
