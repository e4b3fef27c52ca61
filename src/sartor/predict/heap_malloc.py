"""glibc's malloc (ptmalloc2, main arena) as PyTorch's CPU allocator calls it: `posix_memalign(64)` and `free`.

Followed from malloc/malloc.c, 64 bit, and checked against glibc 2.36 only; functions are named after what they follow. Left
out: other arenas (tensors are made in one thread). Chunks are what lies between two headers: a tensor's bytes, 16 bytes in
front, rounded up to 16.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass

HEADER = 16
"""Two size fields before what the caller gets (`CHUNK_HDR_SZ`)."""
SIZE_FIELD = 8
"""`SIZE_SZ`: a live chunk borrows the other field from its right neighbour."""
GRANULE = 16
"""`MALLOC_ALIGNMENT`."""
MIN_CHUNK = 32
"""`MINSIZE`."""
MIN_LARGE = 1024
"""`MIN_LARGE_SIZE`: below it a bin holds one size, first in first out."""
MAX_CACHED = 1040
"""Largest chunk of the thread's cache (`tcache_max_bytes` 1032, and its header)."""
CACHED_CHUNKS = 7
"""`TCACHE_FILL_COUNT`: chunks the thread's cache keeps of a size. `posix_memalign` never takes them out again."""
CACHE_BYTES = 0x290
"""Chunk of `tcache_perthread_struct`, from 2.30 on."""
MAX_FAST = 128
"""Largest chunk that is freed without merging (`DEFAULT_MXFAST`)."""
CONSOLIDATION_BYTES = 65536
"""`FASTBIN_CONSOLIDATION_THRESHOLD`: freeing so much merges fast chunks and may trim the top."""


@dataclass(frozen=True, kw_only=True)
class HeapConfig:
    """Settings of malloc (defaults: malloc.c) and of PyTorch (c10/core/alignment.h), and the state to start from.

    mmap_threshold_bytes: requests from here on that no free chunk serves get pages of their own (`DEFAULT_MMAP_THRESHOLD`). It
    rises to the size of each such chunk that is freed, up to `mmap_threshold_max_bytes` (`DEFAULT_MMAP_THRESHOLD_MAX`), and the
    trim threshold to twice that. `dynamic` is false where MALLOC_MMAP_THRESHOLD_ or its like are set.
    trim_threshold_bytes: a top chunk from here on is given back (`DEFAULT_TRIM_THRESHOLD`), less `top_pad_bytes`
    (`DEFAULT_TOP_PAD`), by which the heap also grows.
    free_chunks: sizes of chunks that are free, and resident, at the start; none touches another.
    """

    mmap_threshold_bytes: int = 128 * 1024
    mmap_threshold_max_bytes: int = 32 * 1024 * 1024
    trim_threshold_bytes: int = 128 * 1024
    top_pad_bytes: int = 128 * 1024
    dynamic: bool = True
    alignment: int = 64
    page_bytes: int = 4096
    free_chunks: tuple[int, ...] = ()


class Chunk:
    """A piece of the heap, or of a mapping. `right` is None before the top chunk."""

    __slots__ = ("free", "left", "mapped", "right", "size", "start")

    def __init__(self, start: int, size: int, left: Chunk | None = None, right: Chunk | None = None) -> None:
        self.start = start
        self.size = size
        self.left = left
        self.right = right
        self.free = False
        self.mapped = 0
        """Bytes of the mapping, where the chunk has one of its own."""


class Bins:
    """Free chunks by size: best fit, ties as in glibc."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._chunks: dict[int, dict[Chunk, None]] = {}

    def add(self, chunk: Chunk) -> None:
        """Large bins put a chunk second among its equals: the first stays first, the others are last in, first out."""
        equal = self._chunks.get(chunk.size)
        if equal is None:
            self._chunks[chunk.size] = {chunk: None}
            insort(self._sizes, chunk.size)
        else:
            equal[chunk] = None

    def remove(self, chunk: Chunk) -> None:
        equal = self._chunks[chunk.size]
        first = next(iter(equal)) is chunk
        del equal[chunk]
        if not equal:
            self._drop(chunk.size)
        elif first and chunk.size >= MIN_LARGE and len(equal) > 1:
            newest = equal.popitem()[0]  # the second in the list becomes the first
            self._chunks[chunk.size] = {newest: None, **equal}

    def exact(self, size: int) -> Chunk | None:
        """The oldest chunk of a small bin."""
        equal = self._chunks.get(size)
        return None if equal is None else self._take(size, equal, oldest=True)

    def best_fit(self, size: int) -> Chunk | None:
        """The smallest chunk that is large enough. Of equals: in the request's own bin the newest, in another the oldest."""
        place = bisect_left(self._sizes, size)
        if place == len(self._sizes):
            return None
        found = self._sizes[place]
        return self._take(found, self._chunks[found], oldest=bin_index(found) != bin_index(size))

    def _take(self, size: int, equal: dict[Chunk, None], *, oldest: bool) -> Chunk:
        if oldest and len(equal) > 1:
            order = iter(equal)
            chunk = next(order)
            if size >= MIN_LARGE:
                chunk = next(order)
            del equal[chunk]
        else:
            chunk = equal.popitem()[0]
        if not equal:
            self._drop(size)
        return chunk

    def _drop(self, size: int) -> None:
        del self._chunks[size]
        del self._sizes[bisect_left(self._sizes, size)]


def bin_index(size: int) -> int:
    """`bin_index` (`largebin_index_64`): spacing 64 B, 512 B, 4 KiB, 32 KiB, 256 KiB, and one bin for the rest."""
    if size < MIN_LARGE:
        return size >> 4
    for shift, most, base in ((6, 48, 48), (9, 20, 91), (12, 10, 110), (15, 4, 119), (18, 2, 124)):
        if size >> shift <= most:
            return base + (size >> shift)
    return 126


class Malloc:
    """The main arena and the mappings. Addresses are relative to the heap's start."""

    def __init__(self, config: HeapConfig | None = None) -> None:
        self.config = config or HeapConfig()
        self.mapped_bytes = 0
        self.resident_mapped_bytes = 0
        self._mmap_threshold = self.config.mmap_threshold_bytes
        self._trim_threshold = self.config.trim_threshold_bytes
        self._top = self._touched = CACHE_BYTES  # the first chunk of the heap is the cache itself
        self._end = -(-(CACHE_BYTES + self.config.top_pad_bytes + MIN_CHUNK) // self.config.page_bytes) * self.config.page_bytes
        self._last: Chunk | None = None
        self._bins = Bins()
        self._unsorted: dict[Chunk, None] = {}
        self._fast: list[Chunk] = []
        self._cached: defaultdict[int, list[Chunk]] = defaultdict(list)
        self._last_remainder: Chunk | None = None
        border = Chunk(0, MIN_CHUNK)  # in use for good: what lies to its left is asked of free chunks only
        for place, size in enumerate(self.config.free_chunks):
            chunk = Chunk(-(place + 1) * 2**40, size, None, border)  # below the heap and far from all others
            chunk.free = True
            self._bins.add(chunk)

    @property
    def arena_bytes(self) -> int:
        """Size of the heap (`mallinfo2().arena`)."""
        return self._end

    @property
    def resident_bytes(self) -> int:
        """Pages of the heap that were touched and not given back, and those of mappings."""
        page = self.config.page_bytes
        return -(-self._touched // page) * page + self.resident_mapped_bytes

    def memalign(self, size_bytes: int) -> Chunk:
        """`_int_memalign`: a larger chunk, whose front and rear are freed again."""
        alignment = self.config.alignment
        size = chunk_size(size_bytes)
        chunk = self._allocate(chunk_size(size + alignment + MIN_CHUNK))
        if chunk.mapped:
            lead = alignment - HEADER
            chunk.size -= lead
            page = self.config.page_bytes
            touched = -(-(lead + HEADER + size_bytes) // page) * page
            self.resident_mapped_bytes += touched - chunk.mapped  # the last page may stay untouched
            chunk.free = False
            chunk.start = touched
            return chunk
        lead = -(chunk.start + HEADER) % alignment
        if lead:
            if lead < MIN_CHUNK:
                lead += alignment
            front, chunk = chunk, self._cut(chunk, lead)
            self.free(front)
        if chunk.size > size + MIN_CHUNK:
            self.free(self._cut(chunk, size))
        return chunk

    def malloc(self, size_bytes: int) -> Chunk:
        """`__libc_malloc`: the thread's cache first."""
        size = chunk_size(size_bytes)
        return self._cached[size].pop() if self._cached.get(size) else self._allocate(size)

    def _allocate(self, size: int) -> Chunk:
        """`_int_malloc`: exact fits, then what was freed lately, then best fit, then the top, then the system."""
        if size < MIN_LARGE:
            chunk = self._bins.exact(size)
            if chunk is not None:
                chunk.free = False
                while self._fits_cache(size) and (other := self._bins.exact(size)) is not None:
                    self._cache(other)
                return chunk
        elif self._fast:
            self._consolidate()
        while True:
            chunk = self._search(size)
            if chunk is not None:
                return chunk
            if self._end - self._top >= size + MIN_CHUNK:
                return self._from_top(size)
            if not self._fast:
                return self._from_system(size)
            self._consolidate()

    def free(self, chunk: Chunk) -> None:
        """`_int_free`."""
        size = chunk.size
        if chunk.mapped:
            self._unmap(chunk)
        elif self._fits_cache(size):
            self._cache(chunk)
        elif size <= MAX_FAST:
            self._fast.append(chunk)
        else:
            size = self._merge(chunk)
            if size >= CONSOLIDATION_BYTES:
                if self._fast:
                    self._consolidate()
                if self._end - self._top >= self._trim_threshold:
                    self._trim()

    def _fits_cache(self, size: int) -> bool:
        return size <= MAX_CACHED and len(self._cached[size]) < CACHED_CHUNKS

    def _cache(self, chunk: Chunk) -> None:
        """`tcache_put`: to its neighbours the chunk stays in use."""
        chunk.free = False
        self._cached[chunk.size].append(chunk)

    def _search(self, size: int) -> Chunk | None:
        """Bin what was freed since the last search, taking an exact fit on the way; then best fit."""
        unsorted = self._unsorted
        if size < MIN_LARGE and len(unsorted) == 1:
            only = next(iter(unsorted))
            if only is self._last_remainder and only.size > size + MIN_CHUNK:
                return self._split(only, size)
        cached = False
        for chunk in list(unsorted):
            del unsorted[chunk]
            if chunk.size != size:
                self._bins.add(chunk)
            elif self._fits_cache(size):
                self._cache(chunk)
                cached = True
            else:
                chunk.free = False
                return chunk
        if cached:
            return self._cached[size].pop()
        found = self._bins.best_fit(size)
        return None if found is None else self._split(found, size)

    def _split(self, chunk: Chunk, size: int) -> Chunk:
        """Take the front of a free chunk; the rest is unsorted."""
        self._unsorted.pop(chunk, None)
        chunk.free = False
        if chunk.size - size >= MIN_CHUNK:
            rest = self._cut(chunk, size)
            rest.free = True
            self._unsorted[rest] = None
            if size < MIN_LARGE:
                self._last_remainder = rest
        return chunk

    def _cut(self, chunk: Chunk, size: int) -> Chunk:
        """Shorten a chunk to `size`; returns the rest, which is in use."""
        rest = Chunk(chunk.start + size, chunk.size - size, chunk, chunk.right)
        if chunk.right is None:
            self._last = rest
        else:
            chunk.right.left = rest
        chunk.right = rest
        chunk.size = size
        return rest

    def _from_top(self, size: int) -> Chunk:
        chunk = Chunk(self._top, size, self._last)
        if self._last is not None:
            self._last.right = chunk
        self._last = chunk
        self._top += size
        if self._top + HEADER > self._touched:  # the new top's header is written too
            self._touched = self._top + HEADER
        return chunk

    def _from_system(self, size: int) -> Chunk:
        """`sysmalloc`: a mapping from the threshold on, else a larger heap."""
        page = self.config.page_bytes
        if size >= self._mmap_threshold:
            chunk = Chunk(0, -(-(size + SIZE_FIELD) // page) * page)
            chunk.mapped = chunk.size
            self.mapped_bytes += chunk.mapped
            self.resident_mapped_bytes += chunk.mapped
            chunk.start = chunk.mapped
            return chunk
        missing = size + self.config.top_pad_bytes + MIN_CHUNK - (self._end - self._top)
        self._end += -(-missing // page) * page
        return self._from_top(size)

    def _unmap(self, chunk: Chunk) -> None:
        """`munmap_chunk`, after `free` has moved the thresholds."""
        if self.config.dynamic and self._mmap_threshold < chunk.size <= self.config.mmap_threshold_max_bytes:
            self._mmap_threshold = chunk.size
            self._trim_threshold = 2 * chunk.size
        self.mapped_bytes -= chunk.mapped
        self.resident_mapped_bytes -= chunk.start

    def _merge(self, chunk: Chunk) -> int:
        """Join a chunk with its free neighbours and put it among the unsorted, or into the top. Returns the joint size."""
        left = chunk.left
        if left is not None and left.free:
            self._unlink(left)
            self._absorb(left, chunk)
            chunk = left
        right = chunk.right
        if right is None:
            self._top = chunk.start
            self._last = chunk.left
            if chunk.left is not None:
                chunk.left.right = None
            return self._end - self._top
        if right.free:
            self._unlink(right)
            self._absorb(chunk, right)
        chunk.free = True
        self._unsorted[chunk] = None
        return chunk.size

    def _absorb(self, chunk: Chunk, right: Chunk) -> None:
        """Make `chunk` reach to the end of its right neighbour."""
        chunk.size += right.size
        chunk.right = right.right
        if right.right is None:
            self._last = chunk
        else:
            right.right.left = chunk

    def _unlink(self, chunk: Chunk) -> None:
        if chunk in self._unsorted:
            del self._unsorted[chunk]
        else:
            self._bins.remove(chunk)

    def _consolidate(self) -> None:
        """`malloc_consolidate`."""
        fast, self._fast = self._fast, []
        fast.reverse()
        for chunk in sorted(fast, key=lambda chunk: chunk.size):  # a bin for each size, last in, first out
            self._merge(chunk)

    def _trim(self) -> None:
        """`systrim`: give the top's whole pages back, less the pad."""
        page = self.config.page_bytes
        surplus = (self._end - self._top - MIN_CHUNK - 1 - self.config.top_pad_bytes) // page * page
        if surplus > 0:
            self._end -= surplus
            self._touched = min(self._touched, self._end)


def chunk_size(size_bytes: int) -> int:
    """`request2size`: a size field and the request, rounded up."""
    return max((size_bytes + SIZE_FIELD + GRANULE - 1) // GRANULE * GRANULE, MIN_CHUNK)
