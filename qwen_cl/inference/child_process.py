"""Work that needs torch, in a process of its own: the launcher has none. No torch."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from qwen_cl.config.errors import RunFailed, UserError
from qwen_cl.config.run import RunConfig
from qwen_cl.config.saved import save_config
from qwen_cl.launch.local import kill_group, terminate_with_parent, worker_environment
from qwen_cl.launch.signals import handle_signals

MISTAKE = "mistake.json"


def run_child(config: RunConfig, what: str) -> None:
    """``python -m qwen_cl.inference.worker DIRECTORY``, its output ours, killed with us.

    Raises:
        UserError, RunFailed: what the child raised, as its own; RunFailed too where it died.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; the child is gone.
    """
    sys.stdout.flush()
    as_interrupt = handle_signals(signal.default_int_handler, [signal.SIGTERM])
    with as_interrupt, tempfile.TemporaryDirectory() as directory:
        save_config(config, Path(directory) / "config.yaml")
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "qwen_cl.inference.worker", directory],
            stdin=subprocess.DEVNULL,
            env=worker_environment(config),
            start_new_session=True,  # a Ctrl-C is for us, who then kill it
            preexec_fn=terminate_with_parent,
        )
        try:
            process.wait()
        finally:
            kill_group(process)
        if process.returncode:
            _raise_again(Path(directory) / MISTAKE, what, process.returncode)


def report_mistake(directory: str, error: UserError | RunFailed) -> None:
    """In the child: hand it to the launcher, which says it like any other."""
    content = {"exit_code": error.exit_code, "message": str(error)}
    (Path(directory) / MISTAKE).write_text(json.dumps(content), encoding="utf-8")


def _raise_again(path: Path, what: str, returncode: int) -> None:
    with suppress(FileNotFoundError):
        told = json.loads(path.read_text(encoding="utf-8"))
        raise (UserError if told["exit_code"] == UserError.exit_code else RunFailed)(told["message"])
    killed = returncode == -signal.SIGKILL
    how = f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with {returncode}"
    raise RunFailed(f"{what} {how}{' (out of memory?)' if killed else '; what it said is above'}")
