"""malloc told to keep freed memory: what the real one then does, each time in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sartor.machine import heap
from sartor.machine.heap import has_glibc

_PROGRAM = """
import ctypes, runpy, sys

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallinfo2.restype = Info
print(runpy.run_path(sys.argv[1])["keep_freed_memory"]())
places = [libc.malloc(40 << 20) for _ in range(3)]
for place in places:
    libc.free(place)
print(libc.mallinfo2().fordblks >> 20)
"""


def _kept(**environment: str) -> tuple[bool, int]:
    """Whether malloc was told, and how many MiB of 120 it kept."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, heap.__file__],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    told, kept = done.stdout.split()
    return told == "True", int(kept)


@pytest.mark.skipif(not has_glibc(), reason="needs glibc")
def test_freed_memory_is_kept() -> None:
    told, kept = _kept()
    assert told
    assert kept >= 120


@pytest.mark.skipif(not has_glibc(), reason="needs glibc")
@pytest.mark.parametrize("variable", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_what_the_user_said_stays(variable: str) -> None:
    told, kept = _kept(**{variable: "131072"})
    assert not told
    assert kept < 120
