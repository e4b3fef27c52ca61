"""The arena: memory for tensors on a CPU, apart from all else and kept from step to step (`arena.cpp`).

Under malloc, small objects that live long come to lie between tensors and hold its heap apart: LoRA runs took up to twice the
memory of their tensors, and every step found some of its pages new. PyTorch lets its allocator be replaced, in C++ only, so this
is compiled like the other kernels, against the headers that PyTorch brings. Where that cannot be, tensors stay with malloc.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch

from sartor.kernels.native import compiled
from sartor.machine.heap import said_of_malloc

LEAST_BYTES = 32 * 2**10
"""Smaller tensors stay with malloc."""
ROUND_BYTES = 4096
GROWS_BY = 2**21
"""The arena ends at a multiple of it: a huge page."""

_SOURCE = Path(__file__).with_name("arena.cpp")


@functools.cache
def _library() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    root = Path(torch.__file__).parent
    flags = (
        f"-DSARTOR_LEAST_BYTES={LEAST_BYTES}",
        f"-DSARTOR_ROUND_BYTES={ROUND_BYTES}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DSARTOR_TORCH={torch.__version__.partition('+')[0].replace('.', '')}",  # compiled anew for another PyTorch
        f"-I{root / 'include'}",
    )
    loaded = compiled("arena", [_SOURCE], flags=flags, links=(f"-L{root / 'lib'}", "-lc10", f"-Wl,-rpath,{root / 'lib'}"))
    if loaded is not None:
        for name in ("top", "in_use", "release"):
            getattr(loaded, f"sartor_arena_{name}").restype = ctypes.c_size_t
    return loaded


def usable() -> bool:
    """Whether runs on this machine's CPU have one: it can be compiled, and the environment names no malloc of its own."""
    return not said_of_malloc() and _library() is not None


def use() -> bool:
    """From now on, this process's tensors on the CPU come from the arena. False where they cannot."""
    loaded = _library() if usable() else None
    return loaded is not None and bool(loaded.sartor_arena_use())


def top_bytes() -> int:
    """What has been in use at most, gaps included."""
    loaded = _library()
    return loaded.sartor_arena_top() if loaded is not None else 0


def give_back() -> None:
    """The memory of free blocks goes back to the system."""
    loaded = _library() if usable() else None
    if loaded is not None:
        loaded.sartor_arena_release()
