"""The server that forks a process per request at a socket and returns its exit code (``tests.support.warm.client``)."""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from typing import Any

from qwen_cl.launch.local import terminate_with_parent


def main(address: str) -> None:
    terminate_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who keep one process each
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                keep(connection)
            connection.close()


def keep(connection: socket.socket) -> None:
    """Run one process until it ends; kill it if its client is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    line, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not line.endswith(b"\n"):
        more = connection.recv(1 << 20)
        if not more:  # the client is gone
            os._exit(1)
        line += more
    process = os.fork()
    if process == 0:
        connection.close()
        become(json.loads(line), streams)
    for stream in streams:
        os.close(stream)
    tell(connection, process)
    ended = os.pidfd_open(process)
    if ended not in select.select([ended, connection.fileno()], [], [])[0]:
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    tell(connection, os.waitstatus_to_exitcode(status))
    os._exit(0)


def tell(connection: socket.socket, number: int) -> None:
    with suppress(OSError):  # the client is gone
        connection.sendall(f"{number}\n".encode())


def become(asked: dict[str, Any], streams: list[int]) -> None:
    """Turn this forked process into the requested one."""
    os.setsid()
    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
        os.close(stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["directory"])
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", encoding="utf-8", buffering=1) for descriptor in (1, 2))
    if asked["quiet"]:
        warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    sys.executable = asked["executable"]
    sys.argv = ["-m", *asked["arguments"]]
    sys.path.insert(0, asked["directory"])
    sys.modules.pop(asked["module"], None)
    os._exit(run(asked["module"]))


def run(module: str) -> int:
    """Run a module as ``python -m`` does; return the exit code after the exit handlers."""
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    last: Any = threading
    last._shutdown()
    last = atexit
    last._run_exitfuncs()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code
