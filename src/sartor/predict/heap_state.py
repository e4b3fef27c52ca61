"""The state of this process's heap, as glibc tells it: what a run that begins now will find."""

from __future__ import annotations

import ctypes
import dataclasses
import re

from sartor.machine.heap import TRIM_THRESHOLD, keeps_freed_memory, mmap_threshold
from sartor.predict.heap_malloc import MIN_CHUNK, HeapConfig

_BIN = re.compile(r'<(?:size|unsorted) from="(\d+)" to="(\d+)" total="(\d+)" count="(\d+)"/>')


def process_heap(config: HeapConfig | None = None, *, kept: bool = False) -> HeapConfig:
    """`config` (default: glibc's) with the free chunks of this process's main arena and settled thresholds; with `kept` those
    that training sets (`sartor.machine.heap`).

    Chunks come from `malloc_info(3)`, which gives each bin's smallest, largest, number and sum. The thresholds cannot be asked
    for; they only ever rise, and loading libraries and data has raised them by the time a step is planned.
    """
    config = config or HeapConfig()
    most = config.mmap_threshold_max_bytes
    settled = dataclasses.replace(config, mmap_threshold_bytes=most, trim_threshold_bytes=2 * most)
    if kept and keeps_freed_memory():
        settled = dataclasses.replace(
            config, mmap_threshold_bytes=mmap_threshold(), trim_threshold_bytes=TRIM_THRESHOLD, dynamic=False
        )
    return dataclasses.replace(settled, free_chunks=tuple(_chunks(_malloc_info())))


def _chunks(info: str) -> list[int]:
    """Sizes of the free chunks of the first arena that `malloc_info` lists, which is the main one."""
    sizes: list[int] = []
    for match in _BIN.finditer(info.partition("</heap>")[0]):
        least, most, total, count = map(int, match.groups())
        if most % 16 == 0:  # fast chunks are all of the upper bound; the others' sizes come with a flag in the last bit
            least = most
        least, most, total = least // 16 * 16, most // 16 * 16, total - count * (most % 16)
        if count == 1 or least == most:
            sizes += [most] * count
            continue
        middle = (total - least - most) // max(count - 2, 1) // 16 * 16
        sizes += [least, *[middle] * (count - 2), most]
    return [size for size in sizes if size >= MIN_CHUNK]


def _malloc_info() -> str:
    """What `malloc_info` writes; empty where the C library has none."""
    libc = ctypes.CDLL(None)
    if not all(hasattr(libc, name) for name in ("malloc_info", "open_memstream", "fclose")):
        return ""
    text, length = ctypes.c_void_p(), ctypes.c_size_t()
    libc.open_memstream.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(length)))
    if not stream.value:
        return ""
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    assert text.value is not None
    written = ctypes.string_at(text.value, length.value).decode("ascii")
    libc.free(text)
    return written
