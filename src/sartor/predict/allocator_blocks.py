"""The parts of PyTorch's CUDA caching allocator: its settings, blocks, pools of free blocks, and expandable segments.

Source of every rule: c10/cuda/CUDACachingAllocator.cpp of PyTorch's main branch between pull requests #172056 (January 2026,
`large_segment_size()`) and #177356 (`throw_on_cudamalloc_oom`, off by default), about torch 2.11; that 2.13 still looks for no
free block after it emptied the cache is in issue #189504. Constants and limits of settings: c10/core/AllocatorConfig.h and
libc10 of torch 2.13.0; a test compares them with the PyTorch that is installed. Names behind 'as' are the functions there.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

MIB = 1 << 20
MIN_BLOCK = 512
"""`kMinBlockSize`: every size is a multiple of it."""
SMALL_SIZE = MIB
"""`kSmallSize`: the largest size that the small pool serves."""
SMALL_BUFFER = 2 * MIB
"""`kSmallBuffer`: a segment, or a page of an expandable segment, of the small pool."""
MIN_LARGE_ALLOC = 10 * MIB
"""`kMinLargeAlloc`: from here on a segment is made to measure."""
ROUND_LARGE = 2 * MIB
"""`kRoundLarge`: segments made to measure are multiples of it."""
UNBOUNDED_ADDRESSES = 1 << 46
UNLIMITED = 1 << 62
_WORD = 64
_ADDRESS = (1 << _WORD) - 1
_NOBODY: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class AllocatorConfig:
    """What PYTORCH_ALLOC_CONF and the card decide. Defaults are PyTorch's.

    `capacity_bytes` is what the allocator can get from the driver at most: the card less the CUDA context and other users.
    `garbage_collection_threshold` is a share of it (PyTorch takes it of the allowance that
    `set_per_process_memory_fraction` sets, and does nothing without one).

    `max_non_split_rounding_bytes` is `large_segment_size_bytes` unless set.

    Raises ValueError for settings that PyTorch refuses or that make no sense.
    """

    capacity_bytes: int | None = None
    expandable_segments: bool = False
    large_segment_size_bytes: int = 20 * MIB
    max_split_size_bytes: int | None = None
    max_non_split_rounding_bytes: int | None = None
    garbage_collection_threshold: float | None = None
    roundup_power2_divisions: int | None = None

    def __post_init__(self) -> None:
        large = self.large_segment_size_bytes
        if large <= MIN_LARGE_ALLOC or large % ROUND_LARGE:
            raise ValueError(f"large_segment_size_bytes is {large}: take a multiple of 2 MiB above 10 MiB")
        for name in ("max_split_size_bytes", "max_non_split_rounding_bytes"):
            value = getattr(self, name)
            if value is not None and value < large:
                raise ValueError(f"{name} is {value}: take at least large_segment_size_bytes ({large}), or None")
        share = self.garbage_collection_threshold
        if share is not None and (not 0 < share < 1 or self.capacity_bytes is None):
            raise ValueError("garbage_collection_threshold is a share between 0 and 1 of capacity_bytes: give both")
        divisions = self.roundup_power2_divisions
        if divisions is not None and (divisions < 0 or divisions & (divisions - 1)):
            raise ValueError(f"roundup_power2_divisions is {divisions}: take a power of two, or None")

    @property
    def split_limit(self) -> int:
        """Blocks from this size on are 'oversize': never split."""
        return UNLIMITED if self.max_split_size_bytes is None else self.max_split_size_bytes

    @property
    def rounding_limit(self) -> int:
        """An oversize block serves requests that are smaller by less than this."""
        rounding = self.max_non_split_rounding_bytes
        return self.large_segment_size_bytes if rounding is None else rounding

    def round_size(self, size_bytes: int) -> int:
        """What a request of so many bytes takes, as `round_size` and `roundup_power2_next_division`."""
        divisions = self.roundup_power2_divisions
        if divisions is None or divisions <= 1 or size_bytes <= MIN_BLOCK * divisions:
            return max(-(-size_bytes // MIN_BLOCK), 1) * MIN_BLOCK
        step = (1 << (size_bytes.bit_length() - 1)) // divisions
        return -(-size_bytes // step) * step

    def segment_size(self, size: int) -> int:
        """What cudaMalloc is asked for when no free block is large enough for `size`, as `get_allocation_size`."""
        if size <= SMALL_SIZE:
            return SMALL_BUFFER
        if size < MIN_LARGE_ALLOC:
            return self.large_segment_size_bytes
        return -(-size // ROUND_LARGE) * ROUND_LARGE

    def should_split(self, rest: int, size: int, *, small: bool) -> bool:
        """Whether the rest of a found block goes back to the pool, as `should_split`. If not, it counts as allocated."""
        if small or self.expandable_segments:
            return rest >= MIN_BLOCK
        return rest > SMALL_SIZE and size < self.split_limit


class Device:
    """The card's memory as the driver lends it: bytes out, their peak, and addresses.

    Addresses rise with every segment and are never given twice. The driver may do otherwise, and then equal free blocks of
    two segments may be taken in another order.
    """

    def __init__(self, capacity_bytes: int | None) -> None:
        self.capacity = UNLIMITED if capacity_bytes is None else capacity_bytes
        # A segment's addresses span 1 1/8 of the card: room to move pages to its end.
        self.address_space = UNBOUNDED_ADDRESSES if capacity_bytes is None else capacity_bytes + capacity_bytes // 8
        self.reserved = 0
        self.peak_reserved = 0
        self.segments = 0
        self._next_address = SMALL_BUFFER

    def take(self, size: int) -> bool:
        """Get physical memory, or False when there is too little."""
        if self.reserved + size > self.capacity:
            return False
        self.reserved += size
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved
        return True

    def give(self, size: int) -> None:
        """Return physical memory."""
        self.reserved -= size

    def addresses(self, size: int) -> int:
        """The start of a fresh range of addresses."""
        start = self._next_address
        self._next_address += size
        self.segments += 1
        return start


class Block:
    """A range of addresses: in use, free, or (expandable segments) not backed by memory. Neighbours are linked."""

    __slots__ = ("address", "allocated", "born", "mapped", "next", "page", "pool", "prev", "requested", "size", "stream", "uses")

    def __init__(self, address: int, size: int, stream: int, pool: BlockPool, page: int = 0) -> None:
        self.address = address
        self.size = size
        self.stream = stream
        self.pool = pool
        self.page = page
        """The page size of the expandable segment it is in; 0 in a cudaMalloc segment."""
        self.requested = 0
        self.born = 0
        self.allocated = False
        self.mapped = True
        self.prev: Block | None = None
        self.next: Block | None = None
        self.uses = _NOBODY
        """Other streams that still use it: it is not free before they are done."""

    def is_split(self) -> bool:
        return self.prev is not None or self.next is not None

    def expandable_size(self) -> int:
        """What it can grow to: itself and the unmapped range behind it."""
        after = self.next
        return self.size + (after.size if after is not None and not after.mapped else 0)

    def link(self, before: Block | None, after: Block | None) -> None:
        """Stand between these two, as `splice`."""
        self.prev, self.next = before, after
        if before is not None:
            before.next = self
        if after is not None:
            after.prev = self


class BlockPool:
    """Free blocks in best-fit order (stream, size, address) and unmapped ranges by (stream, address), as `BlockPool`."""

    def __init__(self, *, small: bool, config: AllocatorConfig) -> None:
        self.small = small
        self.searches = 0
        self.free: dict[int, Block] = {}
        self.unmapped: dict[int, Block] = {}
        self._free_order: list[int] = []
        self._unmapped_order: list[int] = []
        self._expandable = config.expandable_segments
        self._split_limit = config.split_limit
        self._rounding = config.rounding_limit

    def best_fit(self, size: int, stream: int) -> Block | None:
        """Take out the smallest free block of the stream that is large enough, as `get_free_block`."""
        self.searches += 1
        order, free = self._free_order, self.free
        place = bisect_left(order, stream << 2 * _WORD | size << _WORD)
        if place == len(order):
            return None
        block = free[order[place] & _ADDRESS]
        if block.stream != stream:
            return None
        if self._expandable:  # a block that ends in unmapped addresses is as large as it can grow
            while place + 1 < len(order):
                other = free[order[place + 1] & _ADDRESS]
                if other.stream != stream or other.expandable_size() >= block.expandable_size():
                    break
                block, place = other, place + 1
        limit = self._split_limit
        if block.size >= limit and (size < limit or block.size >= size + self._rounding):
            return None
        del order[place]
        del free[block.address]
        return block

    def add(self, block: Block) -> None:
        block.born = self.searches
        self.free[block.address] = block
        insort(self._free_order, block.stream << 2 * _WORD | block.size << _WORD | block.address)

    def remove(self, block: Block) -> None:
        del self.free[block.address]
        key = block.stream << 2 * _WORD | block.size << _WORD | block.address
        del self._free_order[bisect_left(self._free_order, key)]

    def add_unmapped(self, block: Block) -> None:
        self.unmapped[block.address] = block
        insort(self._unmapped_order, block.stream << _WORD | block.address)

    def remove_unmapped(self, block: Block) -> None:
        del self.unmapped[block.address]
        del self._unmapped_order[bisect_left(self._unmapped_order, block.stream << _WORD | block.address)]

    def in_order(self) -> list[Block]:
        """The free blocks by (stream, size, address)."""
        return [self.free[key & _ADDRESS] for key in self._free_order]

    def unmapped_of(self, stream: int) -> list[Block]:
        """The stream's unmapped ranges by address."""
        blocks = (self.unmapped[key & _ADDRESS] for key in self._unmapped_order)
        return [block for block in blocks if block.stream == stream]


def merge(block: Block, other: Block | None) -> None:
    """Let the block swallow its neighbour if that is free too, as `try_merge_blocks`."""
    if other is None or other.allocated or other.uses or block.mapped != other.mapped:
        return
    if other.mapped:
        block.pool.remove(other)
    else:
        block.pool.remove_unmapped(other)
    if block.prev is other:
        block.address = other.address
        block.prev = other.prev
        if block.prev is not None:
            block.prev.next = block
    else:
        block.next = other.next
        if block.next is not None:
            block.next.prev = block
    block.size += other.size


def grow(pool: BlockPool, size: int, stream: int, page: int, device: Device) -> Block | None:
    """Map pages until some block holds `size`, and take it out of the pool; None if memory runs out on the way.

    As `try_allocate_expandable_block`: what was mapped before memory ran out stays mapped and free.
    """
    block = _lowest_room(pool, size, stream, page, device)
    if not block.mapped and not _map(block, min(block.size, size), device):
        return None
    while block.size < size:
        after = block.next
        assert after is not None
        if not _map(after, min(size - block.size, after.size), device):
            return None
        block = after  # it has swallowed the block before it
    pool.remove(block)
    return block


def unmap(block: Block, device: Device) -> None:
    """Return the whole pages inside a free block, as `unmap_block`; a segment without any page goes altogether."""
    page, pool = block.page, block.pool
    start, end = -(-block.address // page) * page, (block.address + block.size) // page * page
    if start >= end:
        return
    pool.remove(block)
    before, after = start - block.address, block.address + block.size - end
    if before:
        part = Block(block.address, before, block.stream, pool, page)
        part.link(block.prev, block)
        pool.add(part)
    if after:
        part = Block(end, after, block.stream, pool, page)
        part.link(block, block.next)
        pool.add(part)
    block.address, block.size, block.mapped = start, end - start, False
    device.give(end - start)
    merge(block, block.prev)
    merge(block, block.next)
    if block.is_split():
        pool.add_unmapped(block)
    else:
        device.segments -= 1


def _lowest_room(pool: BlockPool, size: int, stream: int, page: int, device: Device) -> Block:
    """The lowest addresses, free or unmapped, with room for `size`; else a new segment. As `find_expandable_block`."""
    for block in pool.unmapped_of(stream):
        start = block
        if block.prev is not None and not block.prev.allocated and not block.prev.uses:
            start = block.prev
        room, at = 0, start
        while room < size and not at.allocated and not at.uses:
            room += at.size
            if at.next is None:
                break
            at = at.next
        if room >= size:
            return start
    span = -(-max(device.address_space, size) // page) * page
    # A segment starts on a page, so that pages can be counted from address 0.
    address = device.addresses(span + page)
    block = Block(-(-address // page) * page, span, stream, pool, page)
    block.mapped = False
    pool.add_unmapped(block)
    return block


def _map(block: Block, size: int, device: Device) -> bool:
    """Back the first `size` bytes of an unmapped block by whole pages and make it a free block, as `map_block`."""
    mapped = -(-size // block.page) * block.page
    if not device.take(mapped):
        return False
    pool = block.pool
    pool.remove_unmapped(block)
    block.mapped = True
    if mapped < block.size:
        rest = Block(block.address + mapped, block.size - mapped, block.stream, pool, block.page)
        rest.mapped = False
        rest.link(block, block.next)
        pool.add_unmapped(rest)
        block.size = mapped
    merge(block, block.prev)
    merge(block, block.next)
    pool.add(block)
    return True
