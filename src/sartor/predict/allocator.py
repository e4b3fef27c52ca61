"""Replay events through PyTorch's CUDA caching allocator: what is allocated, active and *reserved*, and when it runs out.

`Allocator` is the allocator (native backend, one device, no CUDA graphs, no private pools); `replay` feeds it a ledger. What
it takes from the source, and where from, stands in `allocator_blocks.py`. Known differences from a device:

- addresses of new segments rise in order of creation: the driver's order may differ, which matters for ties between equal
  free blocks of two segments only;
- a block used on another stream is free again at `synchronize` (or when memory runs out, as in PyTorch), because a ledger
  has no clock that says when the other stream got there;
- memory outside the allocator (context, NCCL, other processes) is the caller's to take off `capacity_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sartor.predict.allocator_blocks import (
    SMALL_BUFFER,
    SMALL_SIZE,
    AllocatorConfig,
    Block,
    BlockPool,
    Device,
    grow,
    merge,
    unmap,
)
from sartor.predict.ledger import Event, Ledger

__all__ = ["Allocator", "AllocatorConfig", "BlockState", "Moment", "OutOfMemory", "Reserved", "replay"]


class OutOfMemory(Exception):
    """cudaMalloc failed and nothing was left to release. Carries what PyTorch's message carries."""

    def __init__(self, *, size_bytes: int, allocated_bytes: int, reserved_bytes: int, capacity_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.capacity_bytes = capacity_bytes
        state = f"{allocated_bytes} B allocated, {reserved_bytes} of {capacity_bytes} B reserved"
        super().__init__(f"tried to get {size_bytes} B from the driver with {state}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockState:
    """One block of a snapshot. `state`: 'allocated', 'waiting' (freed, in use on another stream), 'free' or 'unmapped'."""

    address: int
    size_bytes: int
    state: str


class Allocator:
    """PyTorch's `DeviceCachingAllocator`. Counters are those of `torch.cuda.memory_stats` ('all' pools), in bytes."""

    def __init__(self, config: AllocatorConfig | None = None) -> None:
        self.config = config or AllocatorConfig()
        self.requested = self.allocated = self.active = 0
        self.peak_requested = self.peak_allocated = self.peak_active = 0
        self.retries = 0
        """How often everything cached was released because cudaMalloc failed (`num_alloc_retries`)."""
        self._device = Device(self.config.capacity_bytes)
        self._small = BlockPool(small=True, config=self.config)
        self._large = BlockPool(small=False, config=self.config)
        self._live: dict[int, Block | None] = {}
        self._waiting: list[Block] = []

    @property
    def reserved(self) -> int:
        """Bytes got from the driver: whole segments, or mapped pages."""
        return self._device.reserved

    @property
    def peak_reserved(self) -> int:
        return self._device.peak_reserved

    @property
    def segments(self) -> int:
        """Live cudaMalloc segments, or virtual segments if they are expandable."""
        return self._device.segments

    def malloc(self, key: int, size_bytes: int, stream: int = 0) -> None:
        """Allocate storage `key` on a stream (a number from 0), as `malloc` and `alloc_found_block`.

        Raises OutOfMemory; the state is then that of PyTorch at its error: everything that could be released is.
        Raises ValueError if the key is in use.
        """
        if key in self._live:
            raise ValueError(f"storage {key} is allocated already: free it first")
        if size_bytes <= 0:  # PyTorch never sees empty tensors: they have no address
            self._live[key] = None
            return
        size = self.config.round_size(size_bytes)
        pool = self._small if size <= SMALL_SIZE else self._large
        found = pool.best_fit(size, stream) or self._new_block(pool, size, stream)
        if found is None:
            raise OutOfMemory(
                size_bytes=self.config.segment_size(size),
                allocated_bytes=self.allocated,
                reserved_bytes=self.reserved,
                capacity_bytes=self._device.capacity,
            )
        block = self._split(found, size) if self.config.should_split(found.size - size, size, small=pool.small) else found
        block.allocated = True
        block.requested = size_bytes
        self._live[key] = block
        self.requested += size_bytes
        self.allocated += block.size
        self.active += block.size
        if self.requested > self.peak_requested:
            self.peak_requested = self.requested
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        if self.active > self.peak_active:
            self.peak_active = self.active

    def free(self, key: int) -> None:
        """Free storage `key`, as `free`. Raises ValueError if it is not allocated."""
        if key not in self._live:
            raise ValueError(f"storage {key} is not allocated")
        block = self._live.pop(key)
        if block is None:
            return
        self.allocated -= block.size
        block.allocated = False
        if block.uses:
            self._waiting.append(block)
        else:
            self._to_pool(block)

    def record_stream(self, key: int, stream: int) -> None:
        """Another stream uses the storage: once freed, its block waits for `synchronize`."""
        block = self._live[key]
        if block is not None and stream != block.stream:
            block.uses |= {stream}

    def synchronize(self, stream: int | None = None) -> None:
        """The stream (default: every stream) has finished its work so far: freed blocks that waited for it are free."""
        waiting, self._waiting = self._waiting, []
        for block in waiting:
            block.uses = frozenset() if stream is None else block.uses - {stream}
            if block.uses:
                self._waiting.append(block)
            else:
                self._to_pool(block)

    def empty_cache(self) -> None:
        """Return every segment (or page) without a live block to the driver, as `torch.cuda.empty_cache`."""
        self.synchronize()
        for pool in (self._large, self._small):
            for block in pool.in_order():
                if block.page:
                    unmap(block, self._device)
                elif not block.is_split():
                    self._release(block)

    def snapshot(self) -> list[list[BlockState]]:
        """Every segment, each as its blocks in order of address."""
        everything = [*self._small.free.values(), *self._large.free.values(), *self._small.unmapped.values()]
        everything += [*self._large.unmapped.values(), *self._waiting, *(block for block in self._live.values() if block)]
        segments = []
        for head in sorted((block for block in everything if block.prev is None), key=lambda block: block.address):
            segment, at = [], head
            while True:
                state = "allocated" if at.allocated else "waiting" if at.uses else "free" if at.mapped else "unmapped"
                segment.append(BlockState(address=at.address, size_bytes=at.size, state=state))
                if at.next is None:
                    break
                at = at.next
            segments.append(segment)
        return segments

    def _split(self, block: Block, size: int) -> Block:
        """Cut the front off; the rest, which stays the old block, goes back to the pool."""
        front = Block(block.address, size, block.stream, block.pool, block.page)
        before = block.prev
        block.address += size
        block.size -= size
        front.link(before, block)
        block.pool.add(block)
        return front

    def _to_pool(self, block: Block) -> None:
        """As `free_block`."""
        self.active -= block.size
        self.requested -= block.requested
        merge(block, block.prev)
        merge(block, block.next)
        block.pool.add(block)

    def _new_block(self, pool: BlockPool, size: int, stream: int) -> Block | None:
        """Memory from the driver; if there is none, release what is cached and try again."""
        if self.config.garbage_collection_threshold is not None:
            self._collect_garbage()
        block = self._from_driver(pool, size, stream)
        if block is None and self._release_oversize(pool, size, stream):
            block = self._from_driver(pool, size, stream)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = self._from_driver(pool, size, stream)
        return block

    def _from_driver(self, pool: BlockPool, size: int, stream: int) -> Block | None:
        """As `alloc_block`: one cudaMalloc, or pages mapped."""
        if self.config.expandable_segments:
            page = SMALL_BUFFER if pool.small else self.config.large_segment_size_bytes
            return grow(pool, size, stream, page, self._device)
        segment = self.config.segment_size(size)
        if not self._device.take(segment):
            return None
        return Block(self._device.addresses(segment), segment, stream, pool)

    def _release(self, block: Block) -> None:
        """cudaFree a whole segment, as `release_block`."""
        block.pool.remove(block)
        self._device.give(block.size)
        self._device.segments -= 1

    def _release_oversize(self, pool: BlockPool, size: int, stream: int) -> bool:
        """Under a max_split_size: release one oversize block that is large enough, or several from the largest down.

        As `release_available_cached_blocks`. Oversize blocks are never split, so each is a whole segment.
        """
        limit = self.config.max_split_size_bytes
        if limit is None or self.config.expandable_segments:
            return False
        wanted = max(size, limit)
        oversize = [block for block in pool.in_order() if block.stream == stream and block.size >= limit]
        enough = next((block for block in oversize if block.size >= wanted), None)
        if enough is not None:
            self._release(enough)
            return True
        released = 0
        for block in reversed(oversize):
            if released >= wanted:
                break
            released += block.size
            self._release(block)
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Above the threshold, release free segments that were not used for long, as `garbage_collect_cached_blocks`."""
        assert self.config.capacity_bytes is not None
        assert self.config.garbage_collection_threshold is not None
        surplus = self.reserved - int(self.config.garbage_collection_threshold * self.config.capacity_bytes)
        searches = self._large.searches
        idle = [block for block in self._large.in_order() if not block.is_split() and not block.page]
        total_age = sum(searches - block.born for block in idle)
        while surplus > 0 and idle:
            mean_age = total_age / len(idle)
            old = [block for block in idle if searches - block.born >= mean_age]
            for block in old:
                surplus -= block.size
                total_age -= searches - block.born
                self._release(block)
            idle = [block for block in idle if searches - block.born < mean_age]
            if not old:
                return


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """A number of bytes and when it was reached: the event's place in the ledger and its phase."""

    total_bytes: int
    event: int
    phase: str


@dataclass(frozen=True, kw_only=True)
class Reserved:
    """What a replay found. After running out of memory (`out_of_memory`) nothing further was replayed.

    requested, allocated, active, reserved: the peaks, each at the first event that reached it.
    final_reserved_bytes: what the allocator keeps at the end.
    unused_bytes: reserved, but not allocated, when the peak of reserved was reached: rounding of segments and fragmentation.
    out_of_memory: the event that could not be served, with the bytes it asked the driver for.
    retries: how often the cache was emptied to go on; each stops the device.
    timeline: (event, allocated, reserved) at the fullest event of each of `timeline_points` spans.
    """

    requested: Moment
    allocated: Moment
    active: Moment
    reserved: Moment
    final_reserved_bytes: int
    unused_bytes: int
    out_of_memory: Moment | None
    retries: int
    segments: int
    timeline: tuple[tuple[int, int, int], ...] = ()

    @property
    def fragmentation(self) -> float:
        """The share of the reserved peak that was not allocated."""
        return self.unused_bytes / self.reserved.total_bytes if self.reserved.total_bytes else 0.0


def replay(
    ledger: Ledger | Sequence[Event],
    config: AllocatorConfig | None = None,
    *,
    streams: Mapping[int, int] | None = None,
    timeline_points: int = 0,
) -> Reserved:
    """Feed the events to an `Allocator`. `streams` maps storages to the stream they are allocated on (default: 0)."""
    events = ledger.events if isinstance(ledger, Ledger) else ledger
    streams = streams or {}
    allocator = Allocator(config)
    malloc, free = allocator.malloc, allocator.free
    at_requested = at_allocated = at_active = at_reserved = 0
    requested = allocated = active = reserved = unused = 0
    out_of_memory = None
    timeline = _Timeline(len(events), timeline_points)
    for place, event in enumerate(events):
        size = event.size_bytes
        if size < 0:
            free(event.storage)
        elif size:
            try:
                malloc(event.storage, size, streams.get(event.storage, 0))
            except OutOfMemory as found:
                out_of_memory = Moment(total_bytes=found.size_bytes, event=place, phase=event.phase)
            if allocator.peak_requested > requested:
                requested, at_requested = allocator.peak_requested, place
            if allocator.peak_allocated > allocated:
                allocated, at_allocated = allocator.peak_allocated, place
            if allocator.peak_active > active:
                active, at_active = allocator.peak_active, place
            if allocator.peak_reserved > reserved:
                reserved, at_reserved = allocator.peak_reserved, place
                unused = reserved - allocator.allocated
            if out_of_memory is not None:
                break
        if timeline_points:
            timeline.note(place, allocator.allocated, allocator.reserved)

    def moment(size: int, place: int) -> Moment:
        return Moment(total_bytes=size, event=place, phase=events[place].phase if size else "")

    return Reserved(
        requested=moment(requested, at_requested),
        allocated=moment(allocated, at_allocated),
        active=moment(active, at_active),
        reserved=moment(reserved, at_reserved),
        final_reserved_bytes=allocator.reserved,
        unused_bytes=unused,
        out_of_memory=out_of_memory,
        retries=allocator.retries,
        segments=allocator.segments,
        timeline=tuple(timeline.points),
    )


class _Timeline:
    """Keeps the fullest event of each span of events."""

    def __init__(self, events: int, points: int) -> None:
        self.points: list[tuple[int, int, int]] = []
        self._span = max(-(-events // points), 1) if points else 1
        self._end = 0

    def note(self, place: int, allocated: int, reserved: int) -> None:
        if place >= self._end:
            self._end += self._span
            self.points.append((place, allocated, reserved))
        elif allocated > self.points[-1][1]:
            self.points[-1] = (place, allocated, reserved)
