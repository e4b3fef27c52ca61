"""The memory forecast of a job: the traced peak, what the process adds to it, and what there is."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sartor.errors import JobError
from sartor.job.schema import Job
from sartor.kernels import arena
from sartor.machine import Machine
from sartor.machine.heap import has_glibc
from sartor.machine.memory import resident_bytes
from sartor.machine.products import products_bytes
from sartor.methods import traits
from sartor.model import ModelSource, outline
from sartor.parallel import Layout
from sartor.predict.allocator import AllocatorConfig, replay
from sartor.predict.arena import takes
from sartor.predict.heap import LOADED_BYTES, forecast_heap
from sartor.predict.heap_state import process_heap
from sartor.predict.largest import LargestSteps
from sartor.predict.ledger import Ledger, Peak
from sartor.predict.operations import Operations
from sartor.predict.rates import COMPILED
from sartor.predict.target import Target
from sartor.predict.timeline import MOST_POINTS, Timeline, make_timeline
from sartor.predict.verdict import TIGHT_SHARE, Verdict, judge
from sartor.predict.whole import Traces, trace_job
from sartor.step import Precision


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Memory of a placed run on a level of the machine."""

    name: str
    """device, host or disk."""
    peak_bytes: int
    """On the device and the host, of the process; on disk, of what lives there."""
    capacity_bytes: int | None
    """What there is; None where it is not known."""


@dataclass(frozen=True, kw_only=True)
class MemoryForecast:
    """What a run will need on its device, before a byte is allocated.

    Four numbers that are often confused. `allocated_bytes`: tensors as the step allocates them (`peak` has their parts).
    `active_bytes`: with rounding, and with blocks that wait for a stream. `reserved_bytes`: what PyTorch's allocator has taken
    from the driver. `process_bytes`: what the system shows for the process. On a CPU the allocator is glibc's heap: active and
    reserved are None, and the process is what that heap makes of the tensors, on top of what the process holds already, measured
    now, and what libraries load when they first compute (`baseline_bytes`). On an accelerator `baseline_bytes` is the driver's
    context.
    """

    verdict: Verdict
    reason: str
    peak: Peak | None
    allocated_bytes: int | None
    active_bytes: int | None
    reserved_bytes: int | None
    process_bytes: int | None
    baseline_bytes: int
    available_bytes: int
    tight_share: float
    """The share of what is available above which the verdict is tight."""
    trace_seconds: float
    drift_reserved_bytes: int | None = None
    """The most that the allocator reserves while lengths vary, in the run's own order (`sartor.plan.drift`); None where its
    segments expand or all micro-batches are alike."""
    drift_note: str = ""
    """What there is to say about that."""
    timeline: Timeline | None = None
    """Memory over a step; a picture for the terminal and the page, not part of `to_mapping`."""

    stages: Mapping[int, Operations] = field(default_factory=dict)
    """What a rank of each traced pipeline stage computes; for the time forecast, not part of `to_mapping`."""
    rank: int = 0
    """Of several devices, the one that this is the forecast of: the fullest."""
    ranks: tuple[MemoryForecast, ...] = ()
    """Where ranks differ (pipeline stages): one of each kind, this one among them."""
    host_bytes: int | None = None
    """Resident memory of the process on the host, where tensors are on an accelerator; None where it is not forecast."""
    paged_bytes: int = 0
    """What a paged optimizer keeps in CUDA's unified memory: on the device while there is room beside all that was forecast for
    it, else on the host. In `host_bytes`, since there has to be room for it."""
    tiers: tuple[Tier, ...] = ()
    """Of a run on an accelerator that keeps something elsewhere: every tier it uses."""

    @property
    def interval(self) -> tuple[int, int] | None:
        """Bytes of the process: at least the tensors and what is there already, at most what the verdict makes room for."""
        if self.process_bytes is None or self.peak is None:
            return None
        return min(self.baseline_bytes + self.peak.total_bytes, self.process_bytes), round(self.process_bytes / self.tight_share)

    def to_mapping(self) -> dict[str, Any]:
        """As `sartor plan --json` prints it (docs/plan.md); numbers that could not be forecast are null."""
        on_host = self.reserved_bytes is None
        peak = self.peak
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "device": [rank.device_mapping() for rank in (self.ranks or (self,))],
            "host": {
                "rss_bytes": self.process_bytes if on_host else self.host_bytes,
                "paged_bytes": self.paged_bytes,
            },
            "tiers": [dataclasses.asdict(tier) for tier in self.tiers],
            "breakdown": None
            if peak is None
            else {**peak.by_kind, "process": self.baseline_bytes, "allocator": self.allocator_bytes},
            "by_module": None if peak is None else peak.by_module,
            "peak": None if peak is None else {"phase": peak.phase, "module": peak.module, "kind": peak.kind},
            "trace_seconds": self.trace_seconds,
        }

    def device_mapping(self) -> dict[str, Any]:
        """The numbers of one device."""
        return {
            "rank": self.rank,
            "allocated_bytes": self.allocated_bytes,
            "active_bytes": self.active_bytes,
            "reserved_bytes": self.reserved_bytes,
            "drift_reserved_bytes": self.drift_reserved_bytes,
            "process_bytes": self.process_bytes,
            "capacity_bytes": self.available_bytes,
            "interval": None if self.interval is None else list(self.interval),
        }

    @property
    def allocator_bytes(self) -> int:
        """What the allocator holds beyond the tensors."""
        if self.process_bytes is None or self.peak is None:
            return 0
        return self.process_bytes - self.baseline_bytes - self.peak.total_bytes


def forecast_memory(
    job: Job,
    source: ModelSource,
    machine: Machine,
    work: LargestSteps,
    *,
    precision: Precision,
    recompute: bool,
    attention: str | None,
    layout: Layout | None = None,
    expandable_segments: bool = False,
    processes: int = 1,
    recomputed: int | None = None,
    known: Traces | None = None,
    brief: bool = False,
) -> MemoryForecast:
    """Trace the two steps of `work`, replay the device's allocator, and compare with the device's memory.

    Over several devices: of the rank that needs most; the others are in its `ranks`. Of several processes on a CPU: of the first,
    where `machine` is its part; memory that they share counts where it is written. `recomputed`, `known`: as in `trace_job`.
    `brief`: without a picture of the step, and where memory runs out on an accelerator, with the numbers of that moment.
    """
    options: dict[str, Any] = {
        "precision": precision,
        "recompute": recompute,
        "recomputed": recomputed,
        "attention": attention,
        "layout": layout or Layout(),
    }
    with collector_paused():
        single = {"known": known, "processes": processes}
        return _forecast(job, source, machine, work, expandable_segments, single, options, brief=brief)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Hundreds of thousands of events are made and none is part of a cycle: looking for cycles would take a third of the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _forecast(
    job: Job,
    source: ModelSource,
    machine: Machine,
    work: LargestSteps,
    expandable_segments: bool,
    single: dict[str, Any],
    options: dict[str, Any],
    *,
    brief: bool,
) -> MemoryForecast:
    start = time.perf_counter()
    target, layout, precision = Target.of(machine.device), options["layout"], options["precision"]
    ledgers, reason = [], ""
    try:
        if layout.pipeline > 1:
            from sartor.predict.stages import trace_stages

            ledgers = trace_stages(job, source, work.largest, target, **options)
        else:
            ledgers = [(0, trace_job(job, source, work.first, target, later=work.later, **single, **options))]
    except JobError:
        raise  # the job asks for what there is not
    except Exception as error:  # whatever a foreign model's code raises under tracing: say so, and let the user decide
        reason = f"this model's step cannot be traced ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    # Measured after tracing: by then the libraries that training needs are loaded.
    surroundings = _Surroundings.of(machine, target, layout)
    if not ledgers:
        seconds = time.perf_counter() - start
        return MemoryForecast(**NOTHING, **surroundings.known, verdict="cannot say", reason=reason, trace_seconds=seconds)
    if target.kind == "cpu":
        surroundings = dataclasses.replace(
            surroundings, baseline_bytes=surroundings.baseline_bytes + _products_bytes(ledgers[0][1], work.widths)
        )
    ranks = [
        _of_rank(rank, ledger, target, surroundings, expandable_segments, work.steps, brief=brief) for rank, ledger in ledgers
    ]
    fullest = max(ranks, key=lambda forecast: (forecast.verdict == "does not fit", forecast.process_bytes or 0))
    host = _host_bytes(job, source, precision) if target.kind != "cpu" and layout.devices == 1 else None
    paged = max(ledger.paged_bytes for _, ledger in ledgers)
    seconds = time.perf_counter() - start
    width = layout.devices // layout.pipeline
    return dataclasses.replace(
        fullest,
        ranks=tuple(ranks) if len(ranks) > 1 else (),
        stages={rank // width: ledger.operations for rank, ledger in ledgers},
        host_bytes=None if host is None else host + paged,
        paged_bytes=paged,
        trace_seconds=seconds,
    )


def forecast_ledger(ledger: Ledger, machine: Machine, *, expandable_segments: bool = False, steps: int = 1000) -> MemoryForecast:
    """The forecast of one device from the ledger of its steps, whatever made it."""
    target, layout = Target.of(machine.device), Layout()
    around = _Surroundings.of(machine, target, layout)
    forecast = _of_rank(0, ledger, target, around, expandable_segments, steps, brief=False)
    return dataclasses.replace(forecast, stages={0: ledger.operations}, paged_bytes=ledger.paged_bytes)


@dataclass(frozen=True, kw_only=True)
class _Surroundings:
    """What is on the device beside the job's tensors, and what room there is."""

    baseline_bytes: int
    available_bytes: int
    tight_share: float

    @classmethod
    def of(cls, machine: Machine, target: Target, layout: Layout) -> _Surroundings:
        if machine.device.kind == "cpu":
            arena.give_back()  # of an earlier run in this process
        own = resident_bytes() if machine.device.kind == "cpu" else 0
        around = target.context_bytes + target.communicator_bytes(layout.communicators)
        return cls(
            baseline_bytes=own + LOADED_BYTES if machine.device.kind == "cpu" else around,
            available_bytes=min(machine.device.available_bytes + own, machine.device.total_bytes),
            tight_share=TIGHT_SHARE,
        )

    @property
    def known(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _of_rank(
    rank: int,
    ledger: Ledger,
    target: Target,
    around: _Surroundings,
    expandable_segments: bool,
    steps: int,
    *,
    brief: bool,
) -> MemoryForecast:
    """The forecast of one device, from its ledger."""
    peak, baseline, available = ledger.peak(), around.baseline_bytes, around.available_bytes
    reserved, held = None, []
    if target.kind == "cuda":
        events = target.with_workspace(ledger)
        config = AllocatorConfig(capacity_bytes=max(available - baseline, 0), expandable_segments=expandable_segments)
        reserved = replay(events, config, timeline_points=3 * MOST_POINTS)
        out_of_memory = reserved.out_of_memory
        if out_of_memory is not None and not brief:  # what it would take: the numbers of a card without limit
            config = AllocatorConfig(expandable_segments=expandable_segments)
            reserved = dataclasses.replace(replay(events, config), out_of_memory=out_of_memory)
        held = [(place - len(events) + len(ledger.events), size) for place, _, size in reserved.timeline]
        tensors = reserved.reserved.total_bytes
    else:
        heap, apart = process_heap(kept=True), takes if arena.usable() else None
        tensors = peak.total_bytes
        if has_glibc() or apart:
            tensors = forecast_heap(ledger, heap, steps=steps, apart=apart).peak_resident_bytes
    verdict, reason = judge(baseline + tensors, available, around.tight_share, reserved)
    return MemoryForecast(
        **around.known,
        rank=rank,
        verdict=verdict,
        reason=reason,
        peak=peak,
        allocated_bytes=reserved.allocated.total_bytes if reserved else peak.total_bytes,
        active_bytes=reserved.active.total_bytes if reserved else None,
        reserved_bytes=reserved.reserved.total_bytes if reserved else None,
        process_bytes=baseline + tensors,
        trace_seconds=0.0,
        timeline=None if brief else make_timeline(ledger, held=held),
    )


def _products_bytes(ledger: Ledger, widths: int) -> int:
    """Of the code that products in bfloat16 are compiled to, anew for each width of the batch."""
    products = {
        (operation.name, operation.sizes)
        for operation in ledger.operations.table
        if operation.family == "matmul" and operation.dtype == "bfloat16" and not operation.form.startswith(COMPILED)
    }
    return products_bytes(widths * len(products))


def _host_bytes(job: Job, source: ModelSource, precision: Precision) -> int | None:
    """Resident memory on the host of a run on an accelerator: this process as it is, and the model, which is read into main
    memory before it goes to the device. None for quantised weights, which go over piece by piece. What the driver maps is not in
    it."""
    if job.quantise is not None:
        return None
    model = outline(source, dtype=precision.load_dtype(adapter=traits(job).adapter))
    return resident_bytes() + sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


NOTHING: dict[str, Any] = dict.fromkeys(("peak", "allocated_bytes", "active_bytes", "reserved_bytes", "process_bytes"))
