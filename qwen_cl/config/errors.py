"""Errors shown to the user: one message and an exit code, without a traceback."""

from __future__ import annotations

NO_ROOM_ADVICE = "Earlier checkpoints are intact; free disk space, and the same command resumes the run"
NOT_FINITE_ADVICE = "lower lr or task.clip_grad, or raise task.warmup_steps (the newest checkpoint is from before)"


EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: the run can be started again."""
EXIT_INTERRUPTED = 130
"""The shell's exit code for a program ended by Ctrl-C."""


class UserError(Exception):
    """A mistake in the input. The message names key or file, value, rule and fix; nothing was started or written."""

    exit_code = 2


class RunFailed(Exception):
    """A run that started and did not complete; its folder has the reason."""

    exit_code = 1


class RunPreempted(RunFailed):
    """A run that stopped on a signal or at its time limit; the same command resumes it."""

    def __init__(self, message: str, *, interrupted: bool = True) -> None:
        """Set the exit code: ``interrupted`` by Ctrl-C, or else by a scheduler's signal or the time limit."""
        super().__init__(message)
        self.exit_code = EXIT_INTERRUPTED if interrupted else EXIT_PREEMPTED


def caused_by_interrupt(error: BaseException | None) -> bool:
    """Return True if a KeyboardInterrupt caused the error, also through a library's failed cleanup."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
