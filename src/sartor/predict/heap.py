"""Replay a ledger through glibc's malloc: the resident memory of its tensors on a CPU.

On a CPU, PyTorch gets each storage from `posix_memalign` and gives it back to `free` (c10/core/impl/alloc_cpu.cpp), so resident
memory exceeds the live tensors by the free chunks between them: chunks below malloc's mmap threshold, which rises to 32 MiB
while a program runs, come from one heap that shrinks only at its end. `heap_malloc.py` is that allocator, `heap_state.py` what
it holds already.

Given every request, the replay is exact. A ledger knows storages only; the small objects that C++ keeps beside them (tensor and
storage headers, autograd's nodes) are pinned between them and hold the heap apart: `COMPANIONS` stands for them. Where each one
falls is chance, also in reality: the same job twice differs by 1 to 4 % (with LoRA: by more), so `forecast_heap` averages a few
replays. It is too low for LoRA, whose many small nodes it does not know. Fixed thresholds would avoid all this (dev/LOG.md).

Assumed: glibc (not a preloaded jemalloc, and no THP_MEM_ALLOC_ENABLE); storages are written fully; all are made in one thread,
as forward, CPU backward and optimizer are. Not seen: buffers that a kernel makes inside itself.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sartor.predict.heap_malloc import Chunk, HeapConfig, Malloc
from sartor.predict.ledger import Event, Ledger

__all__ = ["COMPANIONS", "Heap", "HeapConfig", "Malloc", "forecast_heap", "repeat_last_step", "replay_heap"]

COMPANIONS = (16, 24, 176, 96)
"""What PyTorch 2.13 requests beside a storage: counted by a preloaded malloc over a training step, every tensor that outlived the
step had one request each of 24, 96 (`StorageImpl`) and 176 bytes (`TensorImpl`); of those that outlived ten others inside it,
the most frequent were 16 bytes (autograd). One of each is a choice: of some twenty such mixtures tried on five profiled runs
(none is in benchmarks/memory_cpu.py) it came closest; the counted rates themselves came out lower than those runs."""

_STEPS = 3
_REPLAYS = len(COMPANIONS)
"""Each begins with another companion."""


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


def forecast_heap(ledger: Ledger, config: HeapConfig | None = None) -> Heap:
    """What a run adds to the resident memory of a process whose heap is `config`: the middle of a few replays.

    The heap drifts apart for some steps, so the ledger's last step is repeated.
    """
    config = config or HeapConfig()
    events = repeat_last_step(ledger.events, times=_STEPS - 2)
    orders = [COMPANIONS[number:] + COMPANIONS[:number] for number in range(_REPLAYS)]
    found = [replay_heap(events, dataclasses.replace(config, companion_bytes=order)) for order in orders]
    mean = sum(heap.peak_resident_bytes for heap in found) // _REPLAYS
    typical = min(found, key=lambda heap: abs(heap.peak_resident_bytes - mean))
    return dataclasses.replace(typical, peak_resident_bytes=mean)


def replay_heap(ledger: Ledger | Sequence[Event], config: HeapConfig | None = None) -> Heap:
    """Resident bytes that a ledger's storages add under glibc's malloc, exactly as they come."""
    events = ledger.events if isinstance(ledger, Ledger) else ledger
    heap = Malloc(config)
    companions = heap.config.companion_bytes
    chunks: dict[int, list[Chunk]] = {}
    live = peak_live = peak = at = 0
    for place, event in enumerate(events):
        live += event.size_bytes
        if event.size_bytes < 0:
            for chunk in chunks.pop(event.storage):
                heap.free(chunk)
        elif event.size_bytes > 0:  # an empty tensor has no memory
            held = [heap.malloc(size) for size in companions]
            chunks[event.storage] = [heap.memalign(event.size_bytes), *held]
            peak_live = max(peak_live, live)
            resident = heap.resident_bytes
            if resident > peak:
                peak, at = resident, place
    return Heap(
        peak_resident_bytes=peak,
        event=at,
        phase=events[at].phase if events else "",
        final_resident_bytes=heap.resident_bytes,
        peak_live_bytes=peak_live,
    )


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
                result.append(dataclasses.replace(event, storage=names[event.storage]))
            elif event.size_bytes < 0 and event.storage in heirs:
                result.append(dataclasses.replace(event, storage=before[heirs[event.storage]]))
    return result
