"""A run watched from outside: when each of its steps was written, and the most memory it held."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

POLL_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What came of a run. `times[i]` is when line i appeared, in seconds since the process was started."""

    lines: list[dict[str, Any]]
    times: list[float]
    cpu_seconds: list[float]
    """Seconds of any core that the process and its children had used by then."""
    peak_bytes: int
    """Largest resident memory of the process (of the largest, where it has children)."""
    failure: str
    """The end of what it said, where it ended before its last step; else nothing."""


def watch(command: list[str], metrics: Path, *, steps: int, environment: dict[str, str], limit_seconds: float) -> Watched:
    """Run `command` until `metrics` has `steps` lines with a loss, then end it. The clock is this process's for every entrant.

    Nobody is let finish: what a run saves at its end is no part of its speed.
    """
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)
        try:
            lines, times, cpu = _follow(process, metrics, steps, start, limit_seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: the run and its workers
            usage = process_usage(process)
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    enough = len(lines) >= steps
    reason = f"after {time.perf_counter() - start:.0f} s and {len(lines)} of {steps} steps: {text.strip()[-1500:]}"
    return Watched(lines=lines, times=times, cpu_seconds=cpu, peak_bytes=usage, failure="" if enough else reason)


_USAGE: dict[int, int] = {}


def _follow(
    process: subprocess.Popen[bytes], metrics: Path, steps: int, start: float, limit_seconds: float
) -> tuple[list[dict[str, Any]], list[float], list[float]]:
    """The lines as they appear, until there are enough, the process has ended, or its time is up."""
    lines: list[dict[str, Any]] = []
    times: list[float] = []
    cpu: list[float] = []
    offset, rest = 0, b""
    while len(lines) < steps and time.perf_counter() - start < limit_seconds:
        ended = _reap(process, block=False)
        if metrics.exists() and metrics.stat().st_size > offset:
            with metrics.open("rb") as file:
                file.seek(offset)
                new = file.read()
            now = time.perf_counter() - start
            offset += len(new)
            *whole, rest = (rest + new).split(b"\n")
            for line in whole:
                values = json.loads(line)
                if "loss" in values:
                    lines.append(values)
                    times.append(now)
                    cpu.append(_cpu_seconds(process.pid))
        if ended:
            break
        time.sleep(POLL_SECONDS)
    return lines[:steps], times[:steps], cpu[:steps]


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process and of those below it; nan where it is gone."""
    try:
        root = psutil.Process(pid)
        used = [process.cpu_times() for process in [root, *root.children(recursive=True)]]
    except psutil.Error:
        return float("nan")
    return sum(times.user + times.system for times in used)


def _reap(process: subprocess.Popen[bytes], *, block: bool) -> bool:
    """Whether the process has ended; if so its memory is noted."""
    if process.pid in _USAGE:
        return True
    pid, status, usage = os.wait4(process.pid, 0 if block else os.WNOHANG)
    if pid == 0:
        return False
    process.returncode = os.waitstatus_to_exitcode(status)
    _USAGE[process.pid] = usage.ru_maxrss * 1024
    return True


def process_usage(process: subprocess.Popen[bytes]) -> int:
    """Peak resident bytes of a process that has ended or is about to."""
    _reap(process, block=True)
    return _USAGE.pop(process.pid)
