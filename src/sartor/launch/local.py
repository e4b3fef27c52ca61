"""Several processes on this machine: this one is the first, and starts the others; or torchrun has started all of them."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO

import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from sartor.errors import RunError
from sartor.launch.numa import Place, bind, places
from sartor.machine.probe import usable_cpus
from sartor.plan import Plan
from sartor.step import World
from sartor.train import Observer, Run, fit
from sartor.train.loop import assist

JOIN_SECONDS = 300
"""Until all processes have loaded PyTorch and found each other."""
LEAVE_SECONDS = 30
PATIENCE = datetime.timedelta(days=1)
"""Others wait while the first process saves or answers; one that is gone is noticed at once."""
_TAIL = 1500
"""Characters of what a process said before it failed that are shown."""


def run(plan: Plan, *, resume: str | None = None, observers: Sequence[Observer] = ()) -> Run:
    """`sartor.train.fit` in as many processes as the plan says. Raises what it raises, and RunError where a process fails."""
    size = plan.strategy.processes
    if size == 1:
        return fit(plan, resume=resume, observers=observers)
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) == size:
        with _joined() as world:
            return fit(plan, resume=resume, observers=observers, world=world)
    with _started(plan) as world:
        return fit(plan, resume=resume, observers=observers, world=world)


def follow() -> None:
    """Take part in the run of the first process that a launcher started."""
    with _joined() as world:
        assist(world)


def follow_started(rank: int, size: int, port: int) -> None:
    """Take part in the run of the process that started this one and listens at `port`."""
    store = TCPStore("127.0.0.1", port, size, is_master=False)
    store.set(f"here-{rank}", "")
    with _joined(store, rank, size) as world:
        assist(world)


@contextlib.contextmanager
def _joined(store: Store | None = None, rank: int = -1, size: int = -1) -> Iterator[World]:
    """The world of those who meet at a store; without one, the world that the environment names, as torchrun does."""
    _talk_locally(here=store is not None)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _started(plan: Plan) -> Iterator[World]:
    """The world of this process and of those that it starts. They end with it, whatever ends it."""
    size, usable = plan.strategy.processes, usable_cpus()
    own, *others = places(plan.machine.topology, usable, size)
    with contextlib.ExitStack() as stack:
        store = TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        children = [stack.enter_context(_child(rank, size, store.port, place)) for rank, place in enumerate(others, 1)]
        bind(own)
        stack.callback(bind, Place(cpus=tuple(usable)))
        try:
            _wait_for(children, store)
            with _joined(store, 0, size) as world:
                yield world
            _leave(children)
        except RuntimeError as error:  # gloo's, when a process at the other end is gone
            if failed := _failed(children, seconds=LEAVE_SECONDS / 10):
                raise failed from error
            raise


class _Child:
    """A further process, and what it says."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
        self.rank, self.process, self.said = rank, process, said

    def failure(self) -> str:
        """How it ended, if it did so badly; else nothing."""
        code = self.process.poll()
        return "" if not code else f"signal {-code}" if code < 0 else f"exit code {code}"

    def tail(self) -> str:
        self.said.seek(0)
        return self.said.read().decode("utf-8", "replace").strip()[-_TAIL:]


@contextlib.contextmanager
def _child(rank: int, size: int, port: int, place: Place) -> Iterator[_Child]:
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, "-m", "sartor.launch", str(rank), str(size), str(port), place.write()]
        # A session of its own: Ctrl-C reaches the first process, which tells the others.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
        try:
            yield _Child(rank, process, said)
        finally:
            process.kill()
            process.wait()


def _wait_for(children: Sequence[_Child], store: TCPStore) -> None:
    """Until all have come to the store. Raises RunError where one ends before."""
    deadline = time.monotonic() + JOIN_SECONDS
    for child in children:
        while not store.check([f"here-{child.rank}"]):
            if failed := _failed(children, seconds=0):
                raise failed
            if time.monotonic() > deadline:
                raise RunError(f"process {child.rank} did not start within {JOIN_SECONDS} s", why=child.tail())
            time.sleep(0.02)


def _leave(children: Sequence[_Child]) -> None:
    """Let them end by themselves."""
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(timeout=LEAVE_SECONDS)


def _failed(children: Sequence[_Child], *, seconds: float) -> RunError | None:
    """The error that says which process failed and how; None where all are well after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        for child in children:
            if how := child.failure():
                return RunError(
                    f"process {child.rank} of {len(children) + 1} ended ({how}), so the step could not be finished",
                    why=child.tail() or "it said nothing; the system may have ended it for want of memory",
                    remedy="--resume goes on from the last checkpoint; with strategy.processes=1 it needs less memory",
                )
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.05)


def _talk_locally(*, here: bool) -> None:
    """gloo takes the address of the machine's name by default, which a container may not have. `here`: all processes are."""
    here = here or os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    local = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    if here and local:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", min(local))
