"""The memory forecast of generation: `generate` traced, the device's allocator replayed, compared with what there is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sartor.machine import Machine
from sartor.machine.heap import has_glibc
from sartor.machine.memory import resident_bytes
from sartor.model.regions import Reduction
from sartor.predict.allocator import AllocatorConfig, replay
from sartor.predict.generation import CACHE, GenerationTracer, Request
from sartor.predict.heap import LOADED_BYTES, forecast_heap
from sartor.predict.heap_state import process_heap
from sartor.predict.ledger import Ledger
from sartor.predict.memory import NOTHING, MemoryForecast
from sartor.predict.repeat import NotRepeatable
from sartor.predict.target import Target
from sartor.predict.unroll import MOST_EVENTS, generation_ledger
from sartor.predict.verdict import TIGHT_SHARE, judge

HANDLES = 1
"""Of the matrix library: generation has no backward pass, whose thread would take a second one."""
MOST_TRACES = 9
"""Of one search for the largest size that runs."""
PATIENCE_SECONDS = 20.0
"""A model whose trace takes longer (recurrent layers that go through a prompt token by token) is not traced again and again."""
LARGEST = 2**40
SEARCH_EVENTS = MOST_EVENTS // 8
"""Of decoding, in such a search."""
CLOSE = 32
"""A search ends when it knows the answer to one part in so many."""


@dataclass(frozen=True, kw_only=True)
class InferenceForecast:
    """What generation will need. `cache_bytes`: keys and values (or states) at the end of the answers. `expandable_bytes`: the
    process with PyTorch's expandable segments; None where its allocator has none."""

    memory: MemoryForecast
    cache_bytes: int
    expandable_bytes: int | None = None


class InferenceForecaster:
    """One model on one machine, for any number of requests.

    `make_model` gives it on the meta device: without the layers that repeat, where it is asked so, and with what was left out.
    """

    def __init__(self, make_model: Callable[[bool], tuple[nn.Module, Reduction]], machine: Machine) -> None:
        self._make_model, self._machine = make_model, machine
        self._target = Target.of(machine.device)
        self._tracer: GenerationTracer | None = None
        self._known: dict[Request, Ledger] = {}

    def forecast(self, request: Request) -> InferenceForecast:
        """Trace, replay, compare. A model that cannot be traced has the verdict 'cannot say'."""
        start = time.perf_counter()
        target, share = self._target, TIGHT_SHARE
        try:
            ledger = self._ledger(request)
        except Exception as error:  # whatever a foreign model's code raises under tracing: say so, and let the user decide
            reason = f"this model's generation cannot be traced ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            memory = MemoryForecast(
                **NOTHING, **self._surroundings(), verdict="cannot say", reason=reason, trace_seconds=time.perf_counter() - start
            )
            return InferenceForecast(memory=memory, cache_bytes=0)
        known = self._surroundings()
        baseline, available = known["baseline_bytes"], known["available_bytes"]
        peak, reserved, expandable = ledger.peak(), None, None
        if target.kind == "cuda":
            events, room = target.with_workspace(ledger, handles=HANDLES), available - baseline
            reserved = replay(events, AllocatorConfig(capacity_bytes=room))
            tensors = reserved.reserved.total_bytes
            expandable = baseline + replay(events, AllocatorConfig(expandable_segments=True)).reserved.total_bytes
        else:
            tensors = _resident_bytes(ledger)
        verdict, reason = judge(baseline + tensors, available, share, reserved)
        memory = MemoryForecast(
            **known,
            verdict=verdict,
            reason=reason,
            peak=peak,
            allocated_bytes=reserved.allocated.total_bytes if reserved else peak.total_bytes,
            active_bytes=reserved.active.total_bytes if reserved else None,
            reserved_bytes=reserved.reserved.total_bytes if reserved else None,
            process_bytes=baseline + tensors,
            trace_seconds=time.perf_counter() - start,
        )
        return InferenceForecast(memory=memory, cache_bytes=_cache_bytes(ledger), expandable_bytes=expandable)

    def largest(self, request_of: Callable[[int], Request], start: int, limit: int) -> int:
        """The largest size from 1 to `limit` that runs in the share of the memory that is not yet tight, to one part in CLOSE.

        The allocator may empty its cache on the way. `start`: a size that is traced anyway. Memory grows with the size nearly
        on a line, so a few traces find it; 0 where none runs.
        """
        known = self._surroundings()
        room = round(TIGHT_SHARE * known["available_bytes"]) - known["baseline_bytes"]
        sizes: dict[int, int] = {}
        runs, fails = 0, limit + 1
        size: int | None = min(start, limit)
        while size is not None and len(sizes) < MOST_TRACES:
            ledger = self._ledger(request_of(size), most_events=SEARCH_EVENTS)
            sizes[size] = ledger.peak().total_bytes
            if sizes[size] <= room and self._runs(ledger, room):
                runs = size
            else:
                fails = size
            size = _next_size(sizes, room, runs, fails)
        return runs

    def _ledger(self, request: Request, *, most_events: int = MOST_EVENTS) -> Ledger:
        if request not in self._known:
            self._known = {request: self._trace(request, most_events)}  # one at a time: they are large
        return self._known[request]

    def _trace(self, request: Request, most_events: int) -> Ledger:
        tracer = self._tracer or self._make_tracer(shortened=True)
        try:
            ledger = generation_ledger(tracer, request, most_events=most_events)
        except NotRepeatable:
            tracer = self._make_tracer(shortened=False)
            ledger = generation_ledger(tracer, request, most_events=most_events)
        self._tracer = tracer
        return ledger

    def _make_tracer(self, *, shortened: bool) -> GenerationTracer:
        model, reduction = self._make_model(shortened)
        return GenerationTracer(model, target=self._target, reduction=reduction)

    def _surroundings(self) -> dict[str, Any]:
        """What the process holds already, what there is, and from which share on it is tight."""
        device = self._machine.device
        on_cpu = device.kind == "cpu"
        own = resident_bytes() if on_cpu else 0
        baseline = own + LOADED_BYTES if on_cpu else self._target.context_bytes
        available = min(device.available_bytes + own, device.total_bytes)
        return {"baseline_bytes": baseline, "available_bytes": available, "tight_share": TIGHT_SHARE}

    def _runs(self, ledger: Ledger, room_bytes: int) -> bool:
        if self._target.kind != "cuda":
            return _resident_bytes(ledger) <= room_bytes
        events = self._target.with_workspace(ledger, handles=HANDLES)
        return replay(events, AllocatorConfig(capacity_bytes=room_bytes)).out_of_memory is None


def _next_size(sizes: dict[int, int], room_bytes: int, runs: int, fails: int) -> int | None:
    """Where the line through two known sizes meets the room; None where that is close to what is known to run."""
    gap, middle = fails - runs, (runs + fails) // 2
    if gap <= max(1, runs // CLOSE):
        return None
    if len(sizes) == 1:
        return min(2 * runs, fails - 1) if runs else max(fails // 2, 1)
    if not runs:
        first, second = sorted(sizes)[:2]
        return max(min(_meets(sizes, first, second, room_bytes), fails - fails // 4), 1)
    if fails not in sizes:
        first, second = sorted(sizes)[-2:]
        guess = min(_meets(sizes, first, second, room_bytes), fails - 1)
        return guess if guess - runs > runs // CLOSE else None
    if sizes[fails] <= room_bytes:  # the tensors would fit, the allocator's gaps do not
        return max(middle, fails - fails // 8)
    guess = min(_meets(sizes, runs, fails, room_bytes), fails - 1)
    if guess - runs > gap // 8:
        return guess
    return math.isqrt(runs * fails) if fails > 2 * runs else middle  # a curve: the line would creep along it


def _meets(sizes: dict[int, int], first: int, second: int, room_bytes: int) -> int:
    """A little below where the line through two sizes meets the room: the allocator needs some for itself."""
    slope = (sizes[second] - sizes[first]) / (second - first)
    return int(0.995 * (first + (room_bytes - sizes[first]) / slope)) if slope > 0 else LARGEST


def _resident_bytes(ledger: Ledger) -> int:
    return forecast_heap(ledger, process_heap()).peak_resident_bytes if has_glibc() else ledger.peak().total_bytes


def _cache_bytes(ledger: Ledger) -> int:
    """What the cache holds at the end of the ledger."""
    return sum(event.size_bytes for event in ledger.events if ledger.kinds.get(event.storage) == CACHE)
