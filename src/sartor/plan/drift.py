"""Reserved memory of a run whose lengths vary, where the allocator's segments do not expand: the order of its micro-batches
replayed, and what to say about it."""

from __future__ import annotations

import dataclasses

from sartor.data import TokenSet
from sartor.data.order import BatchOrder
from sartor.data.pack import fill_rows, micro_batches, step_batches
from sartor.job.units import format_bytes
from sartor.plan.setting import MOST_STEPS, Setting
from sartor.plan.strategy import Strategy
from sartor.predict import MemoryForecast
from sartor.predict.allocator import AllocatorConfig
from sartor.predict.drift import MOST_EVENTS, Drift, Step, replay_steps, telling_steps
from sartor.predict.shapes import Family, NotComparable, Shape, blank_batch
from sartor.predict.target import Target
from sartor.predict.whole import trace_job

NARROWEST = 16
"""Runs whose rows are all narrower do not fill a segment."""
FEWEST_STEPS = 8
WORTH_SAYING = 1.05
"""Growth from which on the plan says so."""


def with_drift(setting: Setting, strategy: Strategy, forecast: MemoryForecast) -> MemoryForecast:
    """The forecast with `drift_reserved_bytes`, a note and, where the order of lengths needs more than there is, another verdict.

    Unchanged where segments expand, where every micro-batch is as large as the others, and where nothing fits anyway.
    """
    if strategy.expandable_segments or forecast.reserved_bytes is None or forecast.verdict == "does not fit":
        return forecast
    samples, order = setting.sets.train, setting.order
    sizes = [_largest(samples, order, strategy, step) for step in range(min(order.total_steps, MOST_STEPS))]
    if max(sizes) == min(sizes) or max(sizes) // strategy.micro_batch < NARROWEST:
        return forecast
    accumulated = 2 if order.global_batch > strategy.micro_batch else 1
    room = forecast.available_bytes - forecast.baseline_bytes
    configs = [AllocatorConfig(capacity_bytes=room, expandable_segments=expand) for expand in (False, True)]
    try:
        family = _family(setting, strategy, accumulated=accumulated)
        most = max(MOST_EVENTS // len(family.events), FEWEST_STEPS)
        steps = [_shapes(samples, order, strategy, step) for step in telling_steps(sizes, most)]
        fixed, expandable = (replay_steps(family, steps, config, accumulated=accumulated) for config in configs)
    except NotComparable as error:
        note = f"how reserved memory grows as lengths vary is not forecast: {error}"
        return dataclasses.replace(forecast, drift_note=note)
    return _judged(forecast, fixed, _note(forecast.reserved_bytes, fixed, expandable))


def _largest(samples: TokenSet, order: BatchOrder, strategy: Strategy, step: int) -> int:
    """Positions in the largest micro-batch of a step."""
    rows = fill_rows(order.indices(step), samples.lengths, capacity=strategy.row_capacity, packing=strategy.packing)
    groups = micro_batches(rows, strategy.micro_batch)
    return max(len(group) * max(sum(int(samples.lengths[index]) for index in row) for row in group) for group in groups)


def _shapes(samples: TokenSet, order: BatchOrder, strategy: Strategy, step: int) -> Step:
    batches = step_batches(
        samples,
        order.indices(step),
        capacity=strategy.row_capacity,
        packing=strategy.packing,
        micro_batch=strategy.micro_batch,
        pad_id=0,
    )
    return [Shape(len(batch.input_ids_RT), batch.input_ids_RT.shape[1], len(batch.kept_K)) for batch in batches]


def _family(setting: Setting, strategy: Strategy, *, accumulated: int) -> Family:
    """Traces at three shapes with nothing in common, so that no measure is taken for another. Raises NotComparable."""
    target, rows = Target.of(setting.machine.device), strategy.micro_batch
    longest = strategy.row_capacity if strategy.packing else int(setting.sets.train.lengths.max())
    width = max(longest, NARROWEST)
    shapes = [
        Shape(rows, width, 5 * width // 8),
        Shape(rows, 3 * width // 4 | 1, width // 4),
        Shape(rows + 1 if rows > 1 else 1, width // 2 | 1, 2 * width // 5),
    ]
    traces = []
    for shape in shapes:
        ledger = trace_job(
            setting.job,
            setting.source,
            [blank_batch(shape, packing=strategy.packing)] * accumulated,
            target,
            precision=setting.precision,
            recompute=strategy.recompute,
            recomputed=strategy.recomputed,
            attention=strategy.attention,
        )
        traces.append((shape, target.with_workspace(ledger)))
    return Family(traces, ledger.kinds, virtual_tokens=setting.method.virtual_tokens)


def _judged(forecast: MemoryForecast, drift: Drift, note: str) -> MemoryForecast:
    """A run whose largest micro-batch fits does not fit if memory runs out on its way; emptying the cache is tight."""
    verdict, reason = forecast.verdict, forecast.reason
    if drift.out_of_memory:
        steps = len(drift.reserved_bytes)
        verdict = "does not fit"
        reason = f"{reason} with its largest micro-batch, but varying lengths fragment the memory: it runs out after step {steps}"
    elif drift.retries and verdict == "fits":
        verdict = "tight"
    return dataclasses.replace(forecast, drift_reserved_bytes=drift.peak_bytes, drift_note=note, verdict=verdict, reason=reason)


def _note(alone_bytes: int, fixed: Drift, expandable: Drift) -> str:
    """What the growth is, and the way out of it."""
    steps = len(fixed.reserved_bytes)
    if fixed.out_of_memory:
        what = f"memory runs out after {steps} of the steps that were replayed"
    elif fixed.retries or fixed.peak_bytes > WORTH_SAYING * alone_bytes:
        what = (
            f"as lengths vary, reserved memory grows from {format_bytes(alone_bytes)}, which the largest micro-batch needs, "
            f"to {format_bytes(fixed.peak_bytes)} in the {steps} steps that were replayed"
        )
        if fixed.retries:
            what += f", and the allocator has to empty its cache {fixed.retries} times"
    else:
        return ""
    return f"{what}. With strategy.expandable_segments=true it is {format_bytes(expandable.peak_bytes)}"
