"""The errors a user can cause or meet, each one message and an exit code, never a traceback."""

from __future__ import annotations

NO_ROOM_ADVICE = "What was saved before is untouched; make room, and the same command goes on from there"
NOT_FINITE_ADVICE = "lower lr or task.clip_grad, or raise task.warmup_steps (the newest checkpoint is from before)"


EXIT_PREEMPTED = 75
"""sysexits' EX_TEMPFAIL: start it again."""
EXIT_INTERRUPTED = 130
"""What a shell says of a program that Ctrl-C ended."""


class UserError(Exception):
    """A mistake in the input: says key or file, value, rule and fix. Nothing was started or written."""

    exit_code = 2


class RunFailed(Exception):
    """The run started and did not complete; its folder says why."""

    exit_code = 1


class RunPreempted(RunFailed):
    """The run was asked to stop and did; the same command goes on from there."""

    def __init__(self, message: str, *, interrupted: bool = True) -> None:
        """``interrupted`` by Ctrl-C, and not by a signal that schedulers send, or by its own time limit."""
        super().__init__(message)
        self.exit_code = EXIT_INTERRUPTED if interrupted else EXIT_PREEMPTED


def caused_by_interrupt(error: BaseException | None) -> bool:
    """Also where a library, cut short by it, fails of something else while it cleans up."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
