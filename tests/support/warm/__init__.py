"""A Python that has NeMo imported: what the launcher starts as ``python -m`` is forked from a process that has.

NeMo takes ten seconds to import, and most of the runs here take less. The launcher is a process like any other, of the
command a user types; but its ``sys.executable`` is a script (``tests.support.warm.client``) that asks a server
(``tests.support.warm. server``) for the process, gives it its own arguments, environment, working directory and
streams, passes signals on to it, and ends as it ends. What the process is in the system is not the same: it is nobody's
child, in a session of its own, and what Python reads from the environment as it starts, or a library as it is imported,
it has from the server. So tests of how a run starts, is stopped, or is killed take the real Python."""

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
    """The same, for a launcher whose runs are to start warm."""
    path = os.pathsep.join(filter(None, [str(_place()), environment.get("PYTHONPATH")]))
    return {**environment, "PYTHONPATH": path}


@cache
def _place() -> Path:
    """A directory with the script, and the ``sitecustomize`` that makes it Python's own; the server is up."""
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
