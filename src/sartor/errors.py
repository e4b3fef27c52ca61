"""Errors that a person can act on: what happened, why, and what to do next.

`SartorError` and its children are the only exceptions that reach a user; the command line prints them without a
traceback and exits with `exit_code` (1: the run failed; 2: wrong usage, or a job that cannot work).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class SartorError(Exception):
    """Something went wrong while running. `what` happened, `why` where it is known, and the `remedy`."""

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.remedy = what, why, remedy

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.remedy:
            lines.append(f"  try: {self.remedy}")
        return "\n".join(lines)


class UsageError(SartorError):
    """The job, the command line or a file the user named cannot be used as given."""

    exit_code = 2


class JobError(UsageError):
    """The job file or an override is wrong: unknown key, wrong type, value out of range."""


class ModelError(UsageError):
    """The model or tokenizer is missing, unreadable, or of a kind Sartor does not train."""


class DataError(UsageError):
    """The data is missing, malformed, or leaves nothing to train on."""


class DoesNotFit(UsageError):
    """The forecast says that no plan within the user's limits fits this machine."""


class RunError(SartorError):
    """Training, saving or resuming failed; whatever was saved before stays intact."""


class StorageError(RunError):
    """The disk that holds a part of the model did not do its part. What is in memory cannot be relied on."""


class Interrupted(SartorError):
    """A signal asked the run to stop; it finished its step and saved. `exit_code` is 128 + the signal's number."""

    def __init__(self, what: str, *, signal_number: int, remedy: str = "") -> None:
        super().__init__(what, remedy=remedy)
        self.exit_code = 128 + signal_number


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while writing a file that the user asked for into a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {path}", why=error.strerror or str(error), remedy="another file or folder") from error
