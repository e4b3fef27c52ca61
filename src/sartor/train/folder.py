"""The run's folder: one owner at a time, files that appear whole or not at all, and pointers to what is latest."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sartor.errors import RunError, UsageError

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@contextlib.contextmanager
def owned(folder: Path, *, resume: bool) -> Iterator[Path]:
    """Make `folder` and hold its lock. Raises UsageError where another run is at work or has been.

    The lock dies with the process, so a killed run never blocks its own resumption.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}", why=str(error), remedy="choose another `output`") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{folder} is in use by another run", remedy="wait for it, or choose another `output`") from None
        if not resume and (folder / "metrics.jsonl").exists():
            raise UsageError(
                f"{folder} holds a run already",
                why="nothing of it is overwritten",
                remedy="--resume goes on with it; output=… starts another",
            )
        yield folder
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically. Raises RunError."""
    partial = path.with_name(f".{path.name}.partial")
    with explained(path):
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what goes wrong while writing `path` into a RunError that helps."""
    try:
        yield
    except Exception as error:  # safetensors raises its own type for a full disk
        if isinstance(error, RunError):
            raise
        text = str(error)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in text
        if full or "No space left" in text or "os error 27" in text:
            raise RunError(
                f"the disk is full: {path} could not be written",
                why=text,
                remedy="free some space and go on with --resume; what was saved before is intact",
            ) from error
        if isinstance(error, OSError) or "os error" in text:
            raise RunError(f"cannot write {path}", why=text, remedy="what was saved before is intact: --resume") from error
        raise


def sync(folder: Path) -> None:
    """Bring every file of `folder` to the disk, then the folder itself."""
    for path in [*(path for path in folder.rglob("*")), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def remove(path: Path) -> None:
    """Remove a folder so that nobody finds half of it."""
    trash = path.with_name(f".{path.name}.removed")
    path.replace(trash)
    shutil.rmtree(trash, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Let `target` be the same file as `source`: a hard link where the file system has them."""
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copy2(source, partial)
    partial.replace(target)
