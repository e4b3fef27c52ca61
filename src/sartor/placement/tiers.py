"""The lower tiers: host memory outside of the budget, and a file that nobody else sees.

A tier hands out regions and copies bytes between them and memory. It knows nothing of tensors. Copies are made by worker threads
(`Mover`), which hold no lock of Python's while they copy.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from sartor.errors import RunError, StorageError
from sartor.job.units import format_bytes
from sartor.plan.table import SPAN, WORKERS

_ALIGNMENT = 4096
"""Of offsets, lengths and buffers in direct input and output: the page size, a multiple of every block size in use."""


class Region(NamedTuple):
    """Bytes on a tier."""

    offset: int
    size: int


class Tier(Protocol):
    """Where what does not compute lives."""

    name: str
    used_bytes: int
    peak_bytes: int

    def allocate(self, size: int) -> Region:
        """Raises RunError where there is no room."""
        ...

    def free(self, region: Region) -> None: ...

    def read(self, region: Region, start: int, size: int, address: int) -> None:
        """`size` bytes from `start` of the region to memory."""
        ...

    def write(self, region: Region, start: int, size: int, address: int) -> None: ...

    def close(self) -> None: ...


class HostTier:
    """Main memory."""

    name = "host"

    def __init__(self) -> None:
        self._slabs: dict[int, torch.Tensor] = {}
        self._count = 0
        self._lock = threading.RLock()  # a collection that frees may begin while something is allocated
        self.used_bytes = self.peak_bytes = 0

    def view(self, region: Region) -> torch.Tensor:
        """Its bytes."""
        return self._slabs[region.offset][: region.size]

    def allocate(self, size: int) -> Region:
        with self._lock:
            slab = self._make(size)
            self._count += 1
            self._slabs[self._count] = slab
            self._use(size)
            return Region(self._count, size)

    def _make(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def _use(self, size: int) -> None:
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def free(self, region: Region) -> None:
        with self._lock:
            del self._slabs[region.offset]
            self._use(-region.size)

    def read(self, region: Region, start: int, size: int, address: int) -> None:
        ctypes.memmove(address, self._slabs[region.offset].data_ptr() + start, size)

    def write(self, region: Region, start: int, size: int, address: int) -> None:
        ctypes.memmove(self._slabs[region.offset].data_ptr() + start, address, size)

    def close(self) -> None:
        self._slabs.clear()


class DiskTier:
    """One file without a name: gone when the process ends, however it ends. Read and written past the page cache where the file
    system can, so that what is on disk takes no memory."""

    name = "disk"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor, self.direct = _open(folder)
        self._end = 0
        self._sums: dict[int, tuple[int, int]] = {}
        """By the place of a piece in the file: its bytes, and their sum."""
        self._pieces: defaultdict[int, set[int]] = defaultdict(set)
        """The places in every 8 MiB of the file."""
        self._holes: defaultdict[int, list[int]] = defaultdict(list)
        self._local = threading.local()
        self._lock = threading.RLock()  # as above
        self.used_bytes = self.peak_bytes = 0

    def require(self, size: int) -> None:
        """Raises RunError where the disk has not so much room."""
        free = shutil.disk_usage(self._folder).free
        if free < size:
            raise RunError(
                f"{format_bytes(size)} of the run are to live on disk, {self._folder} has {format_bytes(free)} left",
                why="weights, gradients and optimizer state that do not fit in memory are kept in a file there",
                remedy="free some space, or point TMPDIR at a larger disk",
            )

    def allocate(self, size: int) -> Region:
        taken = _rounded(size)
        with self._lock:
            holes = self._holes[taken]
            if holes:
                offset = holes.pop()
            else:
                self._grow(taken)
                offset = self._end
                self._end += taken
            self.used_bytes += taken
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return Region(offset, size)

    def _grow(self, size: int) -> None:
        try:
            os.posix_fallocate(self._descriptor, self._end, size)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                os.ftruncate(self._descriptor, self._end + size)
            else:
                raise _failed("grow", self._folder, error) from error

    def free(self, region: Region) -> None:
        taken = _rounded(region.size)
        with self._lock:
            self._holes[taken].append(region.offset)
            self.used_bytes -= taken

    def read(self, region: Region, start: int, size: int, address: int) -> None:
        buffer, place = self._staging()
        for first, count, taken in _spans(size):
            try:
                got = os.preadv(self._descriptor, [buffer[:taken]], region.offset + start + first)
            except OSError as error:
                raise _failed("read", self._folder, error) from error
            if got < count:
                raise _failed("read", self._folder, OSError(errno.EIO, f"{got} of {count} bytes came back"))
            known, wanted = self._sums.get(region.offset + start + first, (0, 0))
            if known == count and _sum(buffer, count) != wanted:
                raise _failed("read", self._folder, OSError(errno.EIO, "what came back is not what was written"))
            ctypes.memmove(address + first, place, count)

    def write(self, region: Region, start: int, size: int, address: int) -> None:
        buffer, place = self._staging()
        for first, count, taken in _spans(size):
            ctypes.memmove(place, address + first, count)
            self._remember(region.offset + start + first, count, _sum(buffer, count))
            try:
                put = os.pwritev(self._descriptor, [buffer[:taken]], region.offset + start + first)
            except OSError as error:
                raise _failed("write", self._folder, error) from error
            if put < taken:
                raise _failed("write", self._folder, OSError(errno.ENOSPC, f"{put} of {taken} bytes were taken"))
            if not self.direct:
                os.posix_fadvise(self._descriptor, region.offset + start + first, taken, os.POSIX_FADV_DONTNEED)

    def _remember(self, place: int, count: int, total: int) -> None:
        """The sum of these bytes; those of pieces that were cut otherwise are not true any more."""
        with self._lock:
            near = [self._pieces[number] for number in range(place // SPAN - 1, (place + count) // SPAN + 1)]
            for other in [other for pieces in near for other in pieces]:
                if other < place + count and place < other + self._sums[other][0]:
                    del self._sums[other]
                    self._pieces[other // SPAN].discard(other)
            self._sums[place] = count, total
            self._pieces[place // SPAN].add(place)

    def _staging(self) -> tuple[memoryview, int]:
        """A buffer of the calling thread that starts on a page."""
        if not hasattr(self._local, "buffer"):
            try:
                pages = mmap.mmap(-1, SPAN)
            except OSError as error:
                raise MemoryError("can't allocate memory: a buffer between disk and memory") from error
            self._local.buffer = memoryview(pages)
            self._local.place = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        return self._local.buffer, self._local.place

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _sum(buffer: memoryview, count: int) -> int:
    """Of the first `count` bytes as numbers of 8 bytes each: other bytes have another sum."""
    whole = count // 8
    rest = int.from_bytes(buffer[8 * whole : count], "little")
    return int(np.frombuffer(buffer, dtype=np.uint64, count=whole).sum(dtype=np.uint64)) + rest


def _spans(size: int) -> Iterator[tuple[int, int, int]]:
    """What goes through the buffer at once: first byte, how many, and how many with the padding to a whole block."""
    for first in range(0, size, SPAN):
        count = min(SPAN, size - first)
        yield first, count, _rounded(count)


def in_memory(folder: Path) -> bool:
    """Whether the files of a folder are in main memory, as those of /tmp are on some systems."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    around = [(len(point), kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(around, default=(0, ""))[1] in ("tmpfs", "ramfs")


def _open(folder: Path) -> tuple[int, bool]:
    """A file in `folder` that has no name any more, and whether it is open for direct input and output."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        descriptor, name = tempfile.mkstemp(prefix="sartor-", dir=folder)
        try:
            if direct:
                try:
                    again = os.open(name, os.O_RDWR | direct)
                except OSError:  # a file system that keeps everything in memory has none
                    return descriptor, False
                os.close(descriptor)
                return again, True
            return descriptor, False
        finally:
            Path(name).unlink()
    except OSError as error:
        raise _failed("open", folder, error) from error


def _failed(deed: str, folder: Path, error: OSError) -> StorageError:
    """What a person is told when the disk does not do its part."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space there, or point TMPDIR at a larger disk" if full else "point TMPDIR at another disk"
    if error.errno == errno.EFBIG:
        remedy = "raise the limit on the size of files (ulimit -f)"
    return StorageError(
        f"could not {deed} the file in {folder} where the run keeps what does not fit in memory",
        why="the disk is full" if full else error.strerror or str(error),
        remedy=f"{remedy}; --resume goes on from the last checkpoint, which is intact",
    )


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Copy(Protocol):
    """A copy that is under way: a `Future` of a thread, or one on a device's stream."""

    def done(self) -> bool: ...

    def result(self) -> Any:
        """Who computes from now on finds it made. Raises RunError where it failed."""
        ...

    def exception(self) -> BaseException | None:
        """The same, and what went wrong instead of raising it."""
        ...


class Mover:
    """Worker threads that copy, and what is under way to a lower tier. Of accelerators: `sartor.placement.streams`."""

    in_flight_bytes = 2**26
    """At most so many bytes of activations wait to be written."""

    def __init__(self, *, workers: int = WORKERS, note: Callable[[str, str, float], None] = lambda *_: None) -> None:
        """`note`: is told of every copy, by the name of its stream and when it began."""
        self._note = note
        self._readers = ThreadPoolExecutor(workers, "sartor-read")
        self._writers = ThreadPoolExecutor(workers, "sartor-write")
        self._leaving: deque[tuple[Sequence[Copy], int, Callable[[], None]]] = deque()
        self.leaving_bytes = 0
        self.read_bytes = self.written_bytes = 0

    def read(self, tier: Tier, region: Region, storage: torch.UntypedStorage) -> Sequence[Copy]:
        """Begin to fill a storage on the device from a region."""
        self.read_bytes += region.size
        address = storage.data_ptr()
        return self._spread(
            "fetch", self._readers, lambda start, size: tier.read(region, start, size, address + start), region.size
        )

    def write(self, tier: Tier, region: Region, storage: torch.UntypedStorage) -> Sequence[Copy]:
        """Begin to write a storage on the device to a region."""
        self.written_bytes += region.size
        address = storage.data_ptr()
        return self._spread(
            "write back", self._writers, lambda start, size: tier.write(region, start, size, address + start), region.size
        )

    def _spread(self, stream: str, pool: ThreadPoolExecutor, copy: Callable[[int, int], None], size: int) -> list[Future[None]]:
        """`copy` of so many bytes from so many on, in pieces, by the threads of a pool."""

        def timed(*what: int) -> None:
            start = time.perf_counter()
            copy(*what)
            self._note(stream, "", start)

        return [pool.submit(timed, first, min(SPAN, size - first)) for first in range(0, size, SPAN)]

    def leaving(self, copies: Sequence[Copy], size: int, done: Callable[[], None]) -> None:
        """`size` bytes are on their way; `done` is called by `settle` when they have arrived."""
        self._leaving.append((copies, size, done))
        self.leaving_bytes += size

    def settle(self, most: int = 0) -> None:
        """Wait until at most `most` bytes are on their way. Raises RunError where a copy failed."""
        while self._leaving and (self.leaving_bytes > most or all(copy.done() for copy in self._leaving[0][0])):
            copies, size, done = self._leaving.popleft()
            self.leaving_bytes -= size
            for copy in copies:
                copy.result()
            done()

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)
        self._writers.shutdown(cancel_futures=True)
