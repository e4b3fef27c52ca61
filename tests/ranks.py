"""Real ranks for tests: processes that stay, forked from one that has imported the libraries."""

from __future__ import annotations

import atexit
import functools
import gc
import multiprocessing
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

LIBRARIES = ["torch", "torch.distributed.fsdp", "torch.distributed.pipelining", "transformers", "peft", "sartor.api", "pytest"]
"""Imported once for all ranks, by the process that they are forked from."""
SECONDS = 300
"""Longest that a test's ranks may take."""


def collect_rarely() -> None:
    """Python's collector, in this process: as usual it takes a tenth of a test that traces and a quarter of a rank of DTensors,
    since libraries make many objects that stay."""
    gc.set_threshold(10_000, 20, 20)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _serve(pipe: Connection) -> None:
    """Run what comes, as a rank of a gloo process group of its own, until the pipe ends."""
    import torch
    import torch.distributed as dist

    from sartor.predict.world import forget_meshes

    collect_rarely()
    torch.set_num_threads(1)
    while True:
        try:
            rank, world, port, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"tcp://127.0.0.1:{port}")
            told: Any = (True, function(rank, *arguments))
        except BaseException:
            told = (False, traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
            forget_meshes()
        pipe.send(told)


@functools.cache
def _rank(number: int) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    atexit.register(ours.close)
    return process, ours


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` gives on each of `world` processes, which are one gloo process group meanwhile.

    Raises AssertionError with the rank's traceback where one fails; the ranks are then replaced.
    """
    port = free_port()
    pipes = [_rank(number)[1] for number in range(world)]
    for rank, pipe in enumerate(pipes):
        pipe.send((rank, world, port, function, arguments))
    told = []
    for rank, pipe in enumerate(pipes):
        good, value = pipe.recv() if pipe.poll(SECONDS) else (False, f"no answer within {SECONDS} s")
        if not good:
            for number in range(world):
                _rank(number)[0].kill()
            _rank.cache_clear()
            raise AssertionError(f"rank {rank}: {value}")
        told.append(value)
    return told
