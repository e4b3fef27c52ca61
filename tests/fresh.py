"""Processes of their own for tests: forked from one that has imported the libraries and done nothing else."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

from ranks import LIBRARIES, SECONDS, collect_rarely


def _tell(pipe: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    collect_rarely()
    os.environ.clear()  # that of whichever test came first
    os.environ.update(environment)
    try:
        told: Any = (True, function(*arguments))
    except BaseException:
        told = (False, traceback.format_exc())
    pipe.send(told)


def start(function: Callable[..., Any], *arguments: Any) -> tuple[ForkServerProcess, Connection]:
    """A process that calls this, and where it tells whether it came to an end, and what the call gave or its traceback."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(theirs, dict(os.environ), function, arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the call gives in a process of its own. Raises AssertionError with its traceback where it fails."""
    process, pipe = start(function, *arguments)
    try:
        good, value = pipe.recv() if pipe.poll(SECONDS) else (False, f"no answer within {SECONDS} s")
    except EOFError:
        process.join()
        good, value = False, f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    pipe.close()
    if not good:
        raise AssertionError(value)
    return value
