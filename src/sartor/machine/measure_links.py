"""Bandwidths around a device, measured: a disk, the link between main memory and an accelerator, collectives between ranks."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from sartor.errors import UsageError
from sartor.machine.calibration import CollectiveRate, DiskRate, LinkRate
from sartor.machine.clock import Clock

DISK_BYTES = 2**28
_CHUNK_BYTES = 2**22
_DISK_SECONDS = 4.0
"""A slow disk is measured by what it does in this time, writing and reading each."""
_LINK_BYTES = 2**27
_COLLECTIVE_BYTES = (2**12, 2**24)


def disk_rate(folder: Path, notes: list[str], size: int = DISK_BYTES) -> DiskRate | None:
    """Of a file written to `folder` and removed again; None, with a note, where the folder has no room or refuses."""
    try:
        free = shutil.disk_usage(folder).free
        if free < 2 * size:
            notes.append(f"disk not measured: {folder} has less than {2 * size >> 20} MiB free")
            return None
        path = folder / f".sartor-calibration-{os.getpid()}"
        try:
            return _disk_rate(path, size)
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        notes.append(f"disk not measured: {error.strerror or error} ({folder})")
        return None


def _disk_rate(path: Path, size: int) -> DiskRate:
    direct = getattr(os, "O_DIRECT", 0)
    try:
        target = os.open(path, os.O_CREAT | os.O_WRONLY | direct, 0o600)
    except OSError as error:  # file systems in memory refuse direct access
        if error.errno != errno.EINVAL or not direct:
            raise
        direct = 0
        target = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
    # Direct access needs memory at page boundaries; what is written should not compress to nothing.
    with mmap.mmap(-1, _CHUNK_BYTES) as chunk:
        chunk.write(os.urandom(_CHUNK_BYTES))
        with memoryview(chunk) as view:
            try:
                write_seconds, written = _stream(lambda: os.write(target, view), size, flush=lambda: os.fsync(target))
            finally:
                os.close(target)
            source = os.open(path, os.O_RDONLY | direct)
            try:
                if not direct and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(source, 0, 0, os.POSIX_FADV_DONTNEED)
                read_seconds, read = _stream(lambda: os.readv(source, [view]), written)
            finally:
                os.close(source)
    return DiskRate(
        folder=str(path.parent.resolve()),
        direct=bool(direct),
        total_bytes=written,
        write_bytes_per_second=written / write_seconds,
        read_bytes_per_second=read / read_seconds,
    )


def _stream(move: Callable[[], int], size: int, flush: Callable[[], object] = lambda: None) -> tuple[float, int]:
    """Seconds and bytes of moving a file's worth of chunks, or as many as the time allows."""
    moved, start = 0, time.perf_counter()
    while moved < size and time.perf_counter() - start < _DISK_SECONDS:
        count = move()
        if count <= 0:
            break
        moved += count
    flush()
    if not moved:
        raise OSError(errno.EIO, "no byte could be moved")
    return max(time.perf_counter() - start, 1e-9), moved


def link_rate(clock: Clock, notes: list[str]) -> LinkRate | None:
    """Between page-locked main memory and the clock's accelerator, each way alone and both at once."""
    device = clock.device
    try:
        up, down = (torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2))
        there, back = (torch.zeros(_LINK_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
        streams = torch.Stream(device=device), torch.Stream(device=device)
    except (RuntimeError, NotImplementedError) as error:
        notes.append(f"link to {device} not measured: {str(error).partition(chr(10))[0]}")
        return None

    def both() -> None:
        with streams[0]:
            there.copy_(up, non_blocking=True)
        with streams[1]:
            down.copy_(back, non_blocking=True)

    return LinkRate(
        to_device_bytes_per_second=_LINK_BYTES / clock.seconds(lambda: there.copy_(up, non_blocking=True), budget=0.2),
        to_host_bytes_per_second=_LINK_BYTES / clock.seconds(lambda: down.copy_(back, non_blocking=True), budget=0.2),
        both_ways_bytes_per_second=2 * _LINK_BYTES / clock.seconds(both, budget=0.2),
    )


COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")


def measure_collectives(
    group: dist.ProcessGroup | None = None, *, device: torch.device | None = None, names: tuple[str, ...] = COLLECTIVES
) -> tuple[CollectiveRate, ...]:
    """Alpha and beta of collectives, between the ranks of a group that runs (all of them call this).

    All ranks have the same result: the times of the slowest. Raises UsageError where no process group is initialised.
    """
    if not dist.is_initialized():
        raise UsageError("collectives are measured between ranks that run", remedy="torch.distributed.init_process_group first")
    device = device or torch.device("cpu")
    ranks = dist.get_world_size(group)
    clock = Clock(device)
    rates = []
    for name in names:
        small, large = (_collective_seconds(name, size, ranks, group, clock) for size in _COLLECTIVE_BYTES)
        beta = (_COLLECTIVE_BYTES[1] - _COLLECTIVE_BYTES[0]) / max(large - small, 1e-9)
        alpha = max(small - _COLLECTIVE_BYTES[0] / beta, 1e-9)
        backend = dist.get_backend(group)
        rates.append(CollectiveRate(name=name, backend=backend, ranks=ranks, alpha_seconds=alpha, beta_bytes_per_second=beta))
    return tuple(rates)


def _collective_seconds(
    name: str, size: int, ranks: int, group: dist.ProcessGroup | None, clock: Clock, repeats: int = 9
) -> float:
    """The median of a fixed number of repeats, so that all ranks take part in all of them; of the slowest rank."""
    part = torch.zeros(max(1, size // (4 * ranks)), device=clock.device)
    whole = torch.zeros(part.numel() * ranks, device=clock.device)

    def call() -> object:
        if name == "all_reduce":
            return dist.all_reduce(whole, group=group)
        if name == "all_gather":
            return dist.all_gather_into_tensor(whole, part, group=group)
        if name == "reduce_scatter":
            return dist.reduce_scatter_tensor(part, whole, group=group)
        return dist.broadcast(whole, group_src=0, group=group)

    call()
    times = []
    for _ in range(repeats):
        dist.barrier(group)
        times.append(clock.once(call))
    slowest = torch.tensor([statistics.median(times)], device=clock.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return float(slowest)
