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
class _Passes:
    """What is there in forward and backward passes beside weights and state."""

    moments: tuple[tuple[int, int], ...]
    """(activations and temporaries, gradients) at moments with more of one or the other than any other moment has of both."""
    shared: int
    """Bytes of the gradient that embeddings and head share, which is there from the loss on."""

    @classmethod
    def of(cls, ledger: Ledger, shared: int) -> _Passes:
        found: dict[int, int] = {}
        others = gradients = 0
        for event in ledger.events:
            kind = ledger.kinds.get(event.storage)
            gradients += event.size_bytes if kind == "gradients" else 0
            others += event.size_bytes if kind not in MOVED else 0
            if not event.phase.endswith(("clip", "update")):
                found[gradients] = max(found.get(gradients, 0), others)
        moments: list[tuple[int, int]] = []
        for gradients, others in sorted(found.items(), reverse=True):
            if not moments or others > moments[-1][0]:
                moments.append((others, gradients))
        return cls(moments=tuple(moments), shared=shared)

    def most(self, away: int) -> tuple[int, int]:
        """(activations and temporaries, gradients that stay) of the moment with most, where `away` bytes of gradients live
        elsewhere: those of the last rows, which backward passes make first."""
        others, gradients = max(((others, max(made - away, 0)) for others, made in self.moments), key=sum, default=(0, 0))
        return others + (self.shared if away else 0), gradients


@dataclass(frozen=True, kw_only=True)
class _Needs:
    """Bytes that a placed run needs beside the rows of its table."""

    sizes: tuple[Sizes, ...]
    outside: int
    """Weights, gradients and state that are in no row."""
    passes: _Passes
    update: int
    """Temporaries in clipping and update."""

    def in_passes(self, away: int) -> int:
        """Activations, temporaries and gradients that stay, at most, where `away` bytes of gradients do not."""
        return sum(self.passes.most(away))


def cannot_place(setting: Setting, strategy: Strategy) -> str:
    """Why this run's parts all stay in memory; nothing where they need not."""
    if setting.machine.device.kind != "cpu":
        return "placement is for runs on a CPU so far"
    if strategy.processes > 1 or strategy.layout.devices > 1:
        return "placement is for one process"
    if setting.job.quantise is not None:
        return "quantised weights stay where they are"
    if strategy.prepack:
        return "frozen weights that are laid out for products (strategy.prepack) stay where they are"
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
        found = within(
            sizes,
            room,
            "disk",
            passes=needs.in_passes,
            update=needs.update,
            released=True,
            accumulated=accumulates(setting, strategy),
        )
        if found is None:
            largest = max(sizes, key=lambda size: size.least)
            process = base + largest.least + max(needs.in_passes(sum(size.gradients for size in sizes)), needs.update)
            memory = math.ceil(process / forecast.tight_share)
            return Shortfall(memory_bytes=memory, row=largest.name, row_bytes=largest.least)
        table = found
    ahead, left = table.update_room(sizes), room - table.kept_bytes(sizes)
    moving = table.pass_bytes(sizes, accumulated=accumulates(setting, strategy))
    left_in_passes = room - table.lasting_bytes(sizes) - needs.in_passes(table.away_gradients(sizes))
    if needs.update + table.update_peak(sizes, ahead) > room:
        ahead = max(min(left - needs.update, ahead), table.least_bytes(sizes))
    placement = Placement(
        table=table,
        limit_bytes=max(min(left_in_passes, moving), table.least_bytes(sizes)),
        update_limit_bytes=ahead,
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


def accumulates(setting: Setting, strategy: Strategy) -> bool:
    """Whether a step has several micro-batches."""
    return strategy.micro_batch < setting.job.training.global_batch


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
    accumulated = accumulates(setting, strategy)
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
    table, sizes = placement.table, needs.sizes
    kept = {
        kind: sum(getattr(size, kind) for size in sizes if getattr(table.row(size.name), kind) == "device")
        for kind in ("weights", "gradients", "state")
    }
    lasting, moving = kept["weights"] + kept["state"], placement.limit_bytes
    others, gradients = needs.passes.most(table.away_gradients(sizes))
    update = table.update_peak(sizes, placement.update_limit_bytes)
    late = needs.update + update > lasting + others + gradients + moving
    if late:  # gradients of rows that are updated have gone when most is there
        others, moving = needs.update, min(placement.update_limit_bytes, update - lasting)
        gradients = update - lasting - moving
    kept["gradients"] = gradients
    by_kind = dict(zip(KINDS, (kept["weights"] + needs.outside, kept["gradients"], kept["state"], others), strict=True))
    by_kind["on the way to and from disk"] = moving
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
    accumulated = accumulates(setting, strategy)
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
    shared = sum(size.gradients for size, row in zip(sizes, rows, strict=True) if len(row.modules) > 1)
    return _Needs(
        sizes=sizes,
        outside=max(whole - sum(size.total for size in sizes), 0),
        passes=_Passes.of(ledger, shared),
        update=_update_bytes(ledger),
    )


def _update_bytes(ledger: Ledger) -> int:
    """The most that is live in clipping and update of what does not move."""
    live = most = 0
    for event in ledger.events:
        if ledger.kinds.get(event.storage) not in MOVED:
            live += event.size_bytes
            if event.phase.endswith(("clip", "update")):
                most = max(most, live)
    return most
