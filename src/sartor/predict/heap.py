"""Replay a ledger through glibc's malloc: the resident memory of its tensors on a CPU.

A run's tensors come from an arena where it can be compiled (`arena.py`), and only what lies beside them from malloc. Else,
PyTorch gets each storage from `posix_memalign` and gives it back to `free` (c10/core/impl/alloc_cpu.cpp), so resident
memory exceeds the live tensors by the free chunks between them: chunks below malloc's mmap threshold, which rises to 32 MiB
while a program runs, come from one heap that shrinks only at its end. `heap_malloc.py` is that allocator, `heap_state.py` what
it holds already.

For storages alone the replay is exact. Beside them C++ keeps small objects that no ledger knows (tensor and storage headers,
autograd's nodes); they are pinned between storages and hold the heap apart: a LoRA run of 1,060 MiB would have needed 640.
`COMPANIONS` and `PER_NODE` say how many there are of each size. Where each one falls is chance, also in reality, and best fit
amplifies it: the same stream of requests, replayed by glibc itself from another state, peaked 5 % higher or lower. So
`forecast_heap` draws them at random and averages a few replays.

Assumed: glibc (not a preloaded jemalloc, and no THP_MEM_ALLOC_ENABLE); storages are written fully; all are made in one thread,
as forward, CPU backward and optimizer are. Not seen: buffers that a kernel makes inside itself.
"""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sartor.predict.arena import Arena
from sartor.predict.heap_malloc import Chunk, HeapConfig, Malloc
from sartor.predict.ledger import Event, Ledger

__all__ = ["LOADED_BYTES", "Heap", "HeapConfig", "Malloc", "forecast_heap", "repeat_last_step", "replay_heap"]

LOADED_BYTES = 15 * 2**20
"""What a process grows by beside its heap until its second step: pages of PyTorch's kernels that are read when they first run
(8 MiB in float32, 13 in bfloat16), and buffers of MKL and of threads (2 to 6). Measured on four models, 12 to 18 MiB; none is in
benchmarks/memory_cpu.py."""

HEADERS = {24: 1.0, 96: 1.0, 176: 1.0}
"""What a weight comes with: a context, a `StorageImpl`, a `TensorImpl`."""

COMPANIONS = {
    1: {184: 2.3, 24: 2.0, 104: 1.29, 312: 1.07, 72: 0.38, 40: 0.29, 8: 0.23, 56: 0.14, 520: 0.12},
    10: {184: 2.12, 24: 1.13, 312: 1.1, 104: 1.0, 8: 0.05, 56: 0.04},
    100: {24: 12.27, 184: 2.14, 40: 1.98, 488: 1.11, 104: 1.04, 472: 0.8, 312: 0.59, 648: 0.41, 744: 0.39, 536: 0.32, 520: 0.3},
}
"""Small requests (bytes: how many) beside a storage of a step in whose lifetime at least so many are made. Counted, not fitted: a
preloaded malloc recorded the second step of four models under PyTorch 2.13 (full, LoRA at two widths, recomputation; none is in
benchmarks/memory_cpu.py); objects and storages were sorted by how many storages are made while they live, and the one number
divided by the other. The four agree within a tenth for the first two classes. In the last are autograd's nodes and what they
hold, 25 a storage with LoRA and 18 without; where a step is traced, `PER_NODE` says how many."""

PER_NODE = 6.6
"""Small requests of the last class for each node that autograd makes in forward, beside three headers a storage. Counted as
above: 6.61 and 6.59 with LoRA, 6.71 without. Nodes of recomputed blocks are left out: they live for a block's
backward, not as long as the storages that are kept."""

_KEPT = max(COMPANIONS)
_STEPS = 3
_REPLAYS = 3


@dataclass(frozen=True, kw_only=True)
class Heap:
    """What a replay found. `event` and `phase` say when resident memory first reached its peak."""

    peak_resident_bytes: int
    event: int
    phase: str
    final_resident_bytes: int
    peak_live_bytes: int

    @property
    def slack_bytes(self) -> int:
        """What the allocator adds to the fullest moment of the tensors; negative where they reuse what was resident before."""
        return self.peak_resident_bytes - self.peak_live_bytes


def forecast_heap(
    ledger: Ledger, config: HeapConfig | None = None, *, steps: int = _STEPS, apart: Callable[[int], bool] | None = None
) -> Heap:
    """What a run of so many steps adds to the resident memory of a process whose heap is `config`: the middle of a few replays.
    Storages of the sizes that are `apart` have an arena of their own.

    The heap drifts apart for some steps, so the ledger's last one, the second, is repeated where the run has more.
    """
    config = config or HeapConfig()
    events = repeat_last_step(ledger.events, times=max(min(steps, _STEPS) - 2, 0))
    kept = _beside_kept(ledger)
    outlived = _outlived(events)
    found = [replay_heap(events, config, seed=number, kept=kept, apart=apart, outlived=outlived) for number in range(_REPLAYS)]
    mean = sum(heap.peak_resident_bytes for heap in found) // _REPLAYS
    typical = min(found, key=lambda heap: abs(heap.peak_resident_bytes - mean))
    return dataclasses.replace(typical, peak_resident_bytes=mean)


def _beside_kept(ledger: Ledger) -> float | None:
    """How many small requests there are beside a storage that a training step keeps for its backward pass; None where the ledger
    has no such step."""
    done = ledger.operations.step()
    requests = PER_NODE * done.nodes("forward")
    phase = next((part.phase for part in done.segments if part.kind == "forward"), "")
    outlived = _outlived(ledger.events)
    made = [event for event in ledger.events if event.phase == phase and event.size_bytes > 0]
    kept = sum(outlived.get(event.storage, _KEPT) >= _KEPT for event in made)
    return sum(HEADERS.values()) + requests / kept if requests and kept else None


def replay_heap(
    ledger: Ledger | Sequence[Event],
    config: HeapConfig | None = None,
    *,
    seed: int | None = None,
    kept: float | None = None,
    apart: Callable[[int], bool] | None = None,
    outlived: Mapping[int, int] | None = None,
) -> Heap:
    """Resident bytes that a ledger's storages add under glibc's malloc; with companions where there is a seed to draw them by,
    `kept` of them beside a storage that waits for the backward pass (default: as in `COMPANIONS`). Storages of the sizes that are
    `apart` come from an arena, their companions from malloc. `outlived`: as in `_outlived`, where it is known."""
    events = ledger.events if isinstance(ledger, Ledger) else ledger
    heap = Malloc(config)
    companions = _Companions(outlived or _outlived(events), seed, kept) if seed is not None else None
    chunks: dict[int, list[Chunk]] = {}
    arena, blocks = Arena(), dict[int, tuple[int, int]]()
    live = peak_live = peak = at = 0
    for place, event in enumerate(events):
        live += event.size_bytes
        if event.size_bytes < 0:
            for chunk in chunks.pop(event.storage):
                heap.free(chunk)
            if (block := blocks.pop(event.storage, None)) is not None:
                arena.give(block)
        elif event.size_bytes > 0:  # an empty tensor has no memory
            held = [heap.malloc(size) for size in companions.of(event)] if companions else []
            if apart is not None and apart(event.size_bytes):
                blocks[event.storage] = arena.take(event.size_bytes)
            else:
                held.insert(0, heap.memalign(event.size_bytes))
            chunks[event.storage] = held
            peak_live = max(peak_live, live)
            resident = heap.resident_bytes + arena.resident_bytes
            if resident > peak:
                peak, at = resident, place
    return Heap(
        peak_resident_bytes=peak,
        event=at,
        phase=events[at].phase if events else "",
        final_resident_bytes=heap.resident_bytes + arena.resident_bytes,
        peak_live_bytes=peak_live,
    )


class _Companions:
    """Draws the small requests that come just before a storage and live as long as it."""

    def __init__(self, outlives: Mapping[int, int], seed: int, kept: float | None) -> None:
        self._random = random.Random(seed)
        share = 1.0 if kept is None else kept / sum(COMPANIONS[_KEPT].values())
        rates = COMPANIONS | {_KEPT: {size: rate * share for size, rate in COMPANIONS[_KEPT].items()}}
        self._shares = [(least, _split(rates[least])) for least in sorted(COMPANIONS, reverse=True)]
        self._headers = _split(HEADERS)
        self._outlives = outlives

    def of(self, event: Event) -> list[int]:
        outlived = max(self._outlives.get(event.storage, _KEPT), 1)
        shares = self._headers
        if event.phase != "build":
            shares = next(shares for least, shares in self._shares if least <= outlived)
        draw = self._random.random
        sizes: list[int] = []
        for whole, size, part in shares:
            sizes += whole
            if draw() < part:
                sizes.append(size)
        self._random.shuffle(sizes)
        return sizes


def _split(rates: Mapping[int, float]) -> list[tuple[list[int], int, float]]:
    """Of each size, what is always there, and how often there is one more."""
    return [([size] * int(rate), size, rate % 1) for size, rate in rates.items()]


def _outlived(events: Sequence[Event]) -> dict[int, int]:
    """How many storages are made while one lives, itself among them; none is said of those that never die."""
    made = 0
    born: dict[int, int] = {}
    result = {}
    for event in events:
        if event.size_bytes > 0:
            born[event.storage] = made
            made += 1
        elif event.size_bytes < 0:
            result[event.storage] = made - born.pop(event.storage)
    return result


def repeat_last_step(events: Sequence[Event], *, times: int) -> list[Event]:
    """The events with the last step (phases 'step N: …') another few times. What a step leaves behind, the next one frees."""
    phases = [event.phase.partition(":")[0] for event in events]
    last = max((phase for phase in phases if phase.startswith("step ")), key=lambda name: int(name[5:]), default=None)
    if last is None:
        return list(events)
    first, end = phases.index(last), len(phases) - phases[::-1].index(last)
    result, body = list(events[:end]), events[first:end]
    made = {event.storage: event.size_bytes for event in body if event.size_bytes > 0}
    freed = {event.storage for event in body if event.size_bytes < 0}
    left = defaultdict(list)
    for storage in made:
        if storage not in freed:
            left[made[storage]].append(storage)
    heirs = {}  # of what the step found and freed, among what it leaves
    for event in body:
        if event.size_bytes < 0 and event.storage not in made and left[-event.size_bytes]:
            heirs[event.storage] = left[-event.size_bytes].pop(0)
    unused = 1 + max(event.storage for event in events)
    names = {storage: storage for storage in made}
    for number in range(times):
        before, names = names, {storage: unused * (number + 1) + storage for storage in made}
        for event in body:
            if event.storage in made:
                result.append(event._replace(storage=names[event.storage]))
            elif event.size_bytes < 0 and event.storage in heirs:
                result.append(event._replace(storage=before[heirs[event.storage]]))
    return result
