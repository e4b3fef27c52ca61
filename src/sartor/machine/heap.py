"""glibc's malloc told to keep the memory it has, for training on a CPU.

By default it gives large blocks back to the system when they are freed, and free memory at the heap's end as well. A training
step asks for the same blocks again and pays for every page: cleared by the kernel, mapped on first touch. Kept memory costs no
more than the peak, which the step reaches in any case.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform

TRIM_THRESHOLD = 2**63 - 1
"""Free bytes at the heap's end above which it shrinks: never."""

LARGE_BLOCK = 2**20

_MMAP_THRESHOLD, _OLD_MMAP_THRESHOLD = 2**30, 2**25
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _NO_TRIM = -1, -3, -1  # malloc.h, mallopt(3)
_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def has_glibc() -> bool:
    """Whether the C library's malloc is glibc's."""
    return platform.libc_ver()[0] == "glibc"


def mmap_threshold() -> int:
    """Bytes from which on a request gets pages of its own; all smaller ones come from the heap, also when it is full of holes.
    Before 2.35, glibc takes no more than 32 MiB."""
    numbers = platform.libc_ver()[1].split(".")
    recent = [int(number) for number in numbers if number.isdigit()] >= [2, 35]
    return _MMAP_THRESHOLD if recent else _OLD_MMAP_THRESHOLD


def said_of_malloc() -> bool:
    """Whether the environment says something about malloc, or replaces it: then it stays as the user wants it."""
    said = any(name in os.environ for name in _USERS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return said or any(name in os.environ.get("LD_PRELOAD", "") for name in ("jemalloc", "tcmalloc", "mimalloc"))


def keeps_freed_memory() -> bool:
    """Whether `keep_freed_memory` has something to say here: malloc is glibc's, and the environment says nothing about it."""
    return has_glibc() and not said_of_malloc()


def keep_freed_memory() -> bool:
    """Raise malloc's thresholds in this process, from now on. False where they are left as they are."""
    if not keeps_freed_memory():
        return False
    libc = ctypes.CDLL(None)
    return all((libc.mallopt(_M_MMAP_THRESHOLD, mmap_threshold()), libc.mallopt(_M_TRIM_THRESHOLD, _NO_TRIM)))


def give_back_large_blocks() -> None:
    """From now on, large blocks go back to the system when they are freed: where memory is a budget and blocks come and go, a
    heap full of holes takes more than is in use. (Left alone, glibc raises the size from which blocks are given back.)"""
    if keeps_freed_memory():
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)


def give_back_freed_memory() -> None:
    """To the system, once: what is free at the heap's end, and the pages of holes."""
    if has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


class Reserve:
    """Address space that is mapped and never touched, so it takes no memory; it counts where a limit on the address space or on
    data (`ulimit -v`, `ulimit -d`) is what runs out. Given back, it lets Python work on: CPython 3.11 breaks a function when the
    system refuses it a piece of its own stack."""

    def __init__(self, size: int = 64 * 2**20) -> None:
        self._size = size
        self._mapped: mmap.mmap | None = None
        self.hold()

    def hold(self) -> None:
        """Map it, where the limit has that much left."""
        if self._mapped is None and hasattr(mmap, "MAP_PRIVATE"):
            with contextlib.suppress(OSError):
                self._mapped = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def give_back(self) -> None:
        """Unmap it."""
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None
