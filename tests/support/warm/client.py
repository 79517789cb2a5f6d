"""The client that runs ``python [OPTION...] -m MODULE ARGUMENT...`` by the server, and any other command by Python.

It imports as little as possible, as each start of a process pays for it.
"""

import json
import os
import signal
import socket
import sys

MODULES = (
    "qwen_cl.training.worker",
    "qwen_cl.launch.supervisor",
    "qwen_cl.training.dry_run",
    "qwen_cl.inference.worker",
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(address: str, executable: str, arguments: list[str]) -> None:
    options, module, rest = split(arguments)
    if module not in MODULES:
        os.execv(sys.executable, [sys.executable, *arguments])
    asked = {
        "module": module,
        "arguments": rest,
        "quiet": options == ["-W", "ignore"],
        "executable": executable,
        "environment": dict(os.environ),
        "directory": os.getcwd(),  # noqa: PTH109 - pathlib takes longer to import than all of this
    }
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [json.dumps(asked).encode() + b"\n"], [0, 1, 2])
        answers = server.makefile("r")
        process = int(answers.readline())
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: os.kill(process, number))
        code = int(answers.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def split(arguments: list[str]) -> tuple[list[str], str, list[str]]:
    if "-m" not in arguments:
        return arguments, "", []
    place = arguments.index("-m")
    return arguments[:place], arguments[place + 1], arguments[place + 2 :]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
