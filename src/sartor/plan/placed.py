"""A strategy whose weights, gradients and optimizer state do not all stay in memory: which rows live on disk, and its forecast.

The step is traced as it is without placement. At every moment of the trace, what is live of weights, gradients and optimizer
state is left out, and what the table says is there of them is put in its place.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sartor.errors import JobError
from sartor.model import skeleton
from sartor.model.rows import Row, find_rows
from sartor.plan.setting import Setting, largest_steps
from sartor.plan.strategy import Placement, Strategy
from sartor.plan.table import BUFFER_BYTES, Place, Sizes, Table, less_and_less, uniform, within
from sartor.predict import KINDS, Ledger, MemoryForecast, Peak
from sartor.predict.memory import collector_paused
from sartor.predict.target import Target
from sartor.predict.verdict import judge
from sartor.predict.whole import trace_job
from sartor.step import Precision, make_trainable
from sartor.step.optim import state_bytes

MOVED = ("weights", "gradients", "optimizer")


@dataclass(frozen=True, kw_only=True)
class _Needs:
    """Bytes that a placed run needs beside the rows of its table."""

    sizes: tuple[Sizes, ...]
    outside: int
    """Weights, gradients and state that are in no row."""
    passes: int
    """Activations and temporaries in forward and backward passes, at most."""
    update: int
    """Temporaries in clipping and update."""


def cannot_place(setting: Setting, strategy: Strategy) -> str:
    """Why this run's parts all stay in memory; nothing where they need not."""
    if setting.machine.device.kind != "cpu":
        return "placement is for runs on a CPU so far"
    if strategy.processes > 1 or strategy.layout.devices > 1:
        return "placement is for one process"
    if setting.job.quantise is not None:
        return "quantised weights stay where they are"
    if setting.job.strategy.frozen_products == "int8":
        return "frozen weights in int8 (strategy.frozen_products) stay where they are"
    return ""


@dataclass(frozen=True, kw_only=True)
class Shortfall:
    """Not even everything on disk is enough."""

    memory_bytes: int
    """What the process would have to have."""
    row: str
    """The largest row, whose weights and gradients are in memory as a whole while it is updated."""
    row_bytes: int


def place(setting: Setting, strategy: Strategy, forecast: MemoryForecast) -> tuple[Strategy, MemoryForecast] | Shortfall | None:
    """`strategy` with the least on disk that lets it fit, and its forecast; `forecast` is that of the strategy as it is. None
    where its parts cannot be on disk. Raises JobError where placement was asked for and cannot be."""
    wanted = setting.job.strategy.placement
    reason = cannot_place(setting, strategy)
    if reason:
        if wanted == "disk":
            raise JobError(
                "`strategy.placement` is disk, which this job cannot have", why=reason, remedy="strategy.placement=auto"
            )
        return None
    start = time.perf_counter()
    with collector_paused():
        needs = _needs(setting, strategy)
    base = forecast.baseline_bytes + BUFFER_BYTES + needs.outside
    room = int(forecast.tight_share * forecast.available_bytes) - base
    sizes = needs.sizes
    if wanted == "disk":
        table = uniform(sizes, "disk")
    else:
        found = within(sizes, room, "disk", passes=needs.passes, update=needs.update)
        if found is None:
            largest = max(sizes, key=lambda size: size.least)
            process = base + largest.least + max(needs.passes, needs.update)
            memory = math.ceil(process / forecast.tight_share)
            return Shortfall(memory_bytes=memory, row=largest.name, row_bytes=largest.least)
        table = found
    left = room - table.kept_bytes(sizes)
    placement = Placement(
        table=table,
        limit_bytes=max(min(left - needs.passes, table.pass_bytes(sizes)), table.least_bytes(sizes)),
        update_limit_bytes=max(min(left - needs.update, table.update_room(sizes)), table.least_bytes(sizes)),
        disk_bytes=table.tier_bytes(sizes, "disk"),
    )
    peak = _peak(placement, needs)
    process = forecast.baseline_bytes + BUFFER_BYTES + peak.total_bytes
    verdict, words = judge(process, forecast.available_bytes, forecast.tight_share, None)
    placed = dataclasses.replace(
        forecast,
        verdict=verdict,
        reason=words,
        process_bytes=process,
        peak=peak,
        allocated_bytes=peak.total_bytes,
        timeline=None,
        trace_seconds=forecast.trace_seconds + time.perf_counter() - start,
    )
    return dataclasses.replace(strategy, placement=placement), placed


def gradient_width(precision: Precision, *, accumulated: bool) -> int | None:
    """Bytes of an element (None: as many as of the parameter's)."""
    return (4 if accumulated else 2) if precision.masters else None


def row_sizes(rows: Sequence[Row], precision: Precision, optimizer: str, *, accumulated: bool) -> tuple[Sizes, ...]:
    """Of a model's rows under a precision and an optimizer."""
    gradient = gradient_width(precision, accumulated=accumulated)
    kept = functools.partial(state_bytes, optimizer=optimizer, precision=precision)
    return tuple(Sizes.of(row, state_bytes=kept, gradient_bytes=gradient, sliced=True) for row in rows)


def planned_sizes(setting: Setting, strategy: Strategy) -> tuple[Sizes, ...]:
    """Of the rows of a job's model."""
    job, precision = setting.job, setting.precision
    model = skeleton(setting.source, dtype=precision.load_dtype(adapter=setting.method.adapter), attention=strategy.attention)
    model = make_trainable(model, job, precision, recompute=strategy.recompute, meta=True)
    accumulated = strategy.micro_batch < job.training.global_batch
    return row_sizes(find_rows(model), precision, job.training.optimizer, accumulated=accumulated)


def demoted(placement: Placement, sizes: Sequence[Sizes], *, at_least: int) -> Placement | None:
    """With `at_least` so much less in memory, and a quarter less where that can be: first what is fetched ahead goes, then what
    stayed. None where not so much can go."""
    before = placement.memory_bytes(sizes)
    place: Place = "host" if placement.host_bytes else "disk"
    tables = [placement.table, *less_and_less(sizes, place, placement.table)]
    least = min(table.kept_bytes(sizes) + table.least_bytes(sizes) for table in tables)
    target = before - max(at_least, min(before // 4, before - least))
    if target >= before:
        return None
    for largest in (Table.row_bytes, Table.least_bytes):
        for table in tables:
            left = target - table.kept_bytes(sizes)
            if left >= largest(table, sizes):
                return Placement(
                    table=table,
                    limit_bytes=min(placement.limit_bytes, left),
                    update_limit_bytes=min(placement.update_limit_bytes, left),
                    disk_bytes=table.tier_bytes(sizes, "disk"),
                    host_bytes=placement.host_bytes + table.tier_bytes(sizes, "host") - placement.table.tier_bytes(sizes, "host"),
                )
    return None


def _peak(placement: Placement, needs: _Needs) -> Peak:
    """Of rows, activations and temporaries."""
    table = placement.table
    passes, update = needs.passes + placement.limit_bytes, needs.update + placement.update_limit_bytes
    late = update > passes
    kept = {
        kind: sum(getattr(size, kind) for size in needs.sizes if getattr(table.row(size.name), kind) == "device")
        for kind in ("weights", "gradients", "state")
    }
    others = needs.update if late else needs.passes
    by_kind = dict(zip(KINDS, (kept["weights"] + needs.outside, kept["gradients"], kept["state"], others), strict=True))
    by_kind["on the way to and from disk"] = max(passes, update) - others
    return Peak(
        total_bytes=sum(by_kind.values()),
        phase="step 2: update" if late else "step 2: forward and backward",
        by_kind=by_kind,
        kind=max(by_kind, key=by_kind.__getitem__),
    )


def _needs(setting: Setting, strategy: Strategy) -> _Needs:
    job, precision = setting.job, setting.precision
    model = skeleton(setting.source, dtype=precision.load_dtype(adapter=setting.method.adapter), attention=strategy.attention)
    model = make_trainable(model, job, precision, recompute=strategy.recompute, meta=True)
    steps = largest_steps(setting.sets.train, setting.order, strategy)
    accumulated = strategy.micro_batch < job.training.global_batch
    gradient = gradient_width(precision, accumulated=accumulated)
    rows = find_rows(model)
    sizes = row_sizes(rows, precision, job.training.optimizer, accumulated=accumulated)
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    whole = sum(p.numel() * p.element_size() for p in parameters)
    whole += sum(p.numel() * (gradient or p.element_size()) + state_bytes(p, job.training.optimizer, precision) for p in trained)
    ledger = trace_job(
        job,
        setting.source,
        steps.first,
        Target.of(setting.machine.device),
        precision=precision,
        recompute=strategy.recompute,
        attention=strategy.attention,
        layout=strategy.layout,
        later=steps.later,
    )
    passes, update = _others(ledger)
    # the gradient of a weight that embeddings and head share is there from the loss on
    shared = sum(size.gradients for size, row in zip(sizes, rows, strict=True) if len(row.modules) > 1)
    return _Needs(sizes=sizes, outside=max(whole - sum(size.total for size in sizes), 0), passes=passes + shared, update=update)


def _others(ledger: Ledger) -> tuple[int, int]:
    """The most that is live of what does not move: in passes, and in clipping and update."""
    live, most = 0, [0, 0]
    for event in ledger.events:
        if ledger.kinds.get(event.storage) not in MOVED:
            live += event.size_bytes
            late = event.phase.endswith(("clip", "update"))
            most[late] = max(most[late], live)
    return most[0], most[1]
