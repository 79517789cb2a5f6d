"""The child process for work that needs torch, which the launcher does not import."""

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

ERROR_FILE = "error.json"


def run_child(config: RunConfig, description: str) -> None:
    """Run ``python -m qwen_cl.inference.worker DIRECTORY`` to its end, on this process's terminal.

    The child is killed when this process dies.

    Raises:
        UserError, RunFailed: the child raised it. RunFailed also if the child was killed or crashed.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; the child has ended.
    """
    sys.stdout.flush()
    as_interrupt = handle_signals(signal.default_int_handler, [signal.SIGTERM])
    with as_interrupt, tempfile.TemporaryDirectory() as directory:
        save_config(config, Path(directory) / "config.yaml")
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "qwen_cl.inference.worker", directory],
            stdin=subprocess.DEVNULL,
            env=worker_environment(config),
            start_new_session=True,  # Ctrl-C reaches this process only, which then kills the child
            preexec_fn=terminate_with_parent,
        )
        try:
            process.wait()
        finally:
            kill_group(process)
        if process.returncode:
            _reraise(Path(directory) / ERROR_FILE, description, process.returncode)


def report_error(directory: str, error: UserError | RunFailed) -> None:
    """Write the child's error for the launcher, which raises it again."""
    content = {"exit_code": error.exit_code, "message": str(error)}
    (Path(directory) / ERROR_FILE).write_text(json.dumps(content), encoding="utf-8")


def _reraise(path: Path, description: str, returncode: int) -> None:
    with suppress(FileNotFoundError):
        content = json.loads(path.read_text(encoding="utf-8"))
        raise (UserError if content["exit_code"] == UserError.exit_code else RunFailed)(content["message"])
    killed = returncode == -signal.SIGKILL
    ending = f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"exited with code {returncode}"
    raise RunFailed(f"{description} {ending}{' (out of memory?)' if killed else '; see its output above'}")
