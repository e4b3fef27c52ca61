"""The time of a placed step, and which placed strategy takes least of it.

What a row computes is forecast as without placement, and shared out by its weights. What moves takes its bytes over the measured
rate of the disk, on a stream of its own beside the computation, as the engine does it: what the next row needs is fetched when a
row begins, what a row leaves is written when it has computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from sartor.machine.calibration import DiskRate, load_calibration
from sartor.plan.forecast import forecast_of
from sartor.plan.placed import Shortfall, place, planned_sizes
from sartor.plan.setting import Setting
from sartor.plan.strategy import Placement, Strategy
from sartor.plan.table import RowPlaces, Sizes
from sartor.plan.timing import Timing, rates_of
from sartor.predict import MemoryForecast
from sartor.predict.streams import Block, run_blocks
from sartor.predict.time import MOST_SIMULATED, TimeForecast

Found = tuple[Strategy, MemoryForecast, TimeForecast | None]


def place_fastest(
    setting: Setting, strategy: Strategy, forecast: MemoryForecast, time: TimeForecast | None
) -> Found | Shortfall | None:
    """As `place`, and with the time. Where the job leaves the micro-batch open, larger ones are tried as long as they are faster:
    what moves is fetched for each of them."""
    found = place(setting, strategy, forecast)
    if not isinstance(found, tuple):
        return found
    rates, calibration = rates_of(setting.machine), load_calibration(setting.machine)
    if rates is None or calibration is None or calibration.disk is None:
        return *found, None
    timing = Timing(setting, rates)
    best = *found, time_of(timing, *found, calibration.disk, time)
    for other in _larger(setting, strategy) if setting.job.strategy.placement == "auto" else ():
        whole = forecast_of(setting, other)
        placed = place(setting, other, whole)
        if not isinstance(placed, tuple) or placed[1].verdict != "fits":
            break
        seconds = time_of(timing, *placed, calibration.disk, timing.of_forecast(other, whole))
        if seconds is None or best[2] is None or seconds.step_seconds >= best[2].step_seconds:
            break
        best = *placed, seconds
    return best


def _larger(setting: Setting, strategy: Strategy) -> Iterator[Strategy]:
    """The same with micro-batches twice as large, and so on."""
    size = strategy.micro_batch
    while setting.job.strategy.micro_batch == "auto" and size < setting.job.training.global_batch:
        size = min(2 * size, setting.job.training.global_batch)
        yield dataclasses.replace(strategy, micro_batch=size)


def time_of(
    timing: Timing, strategy: Strategy, forecast: MemoryForecast, disk: DiskRate, time: TimeForecast | None
) -> TimeForecast | None:
    """`time`: of the step without placement. None where that is not known."""
    if time is None and forecast.stages:
        time = timing.of_forecast(dataclasses.replace(strategy, placement=None), forecast)
    if time is None or strategy.placement is None:
        return time
    sizes = planned_sizes(timing.setting, strategy)
    micro_batches = timing.workload(strategy).micro_batches
    trained = any(size.gradients for size in sizes)
    backward = (2.0 if trained and timing.setting.job.method == "full" else 1.0) + strategy.recompute
    seconds = step_seconds(time, strategy.placement, sizes, disk, micro_batches=micro_batches, backward=backward)
    waits = seconds - time.step_seconds
    note = f"the disk's rates are those measured in {disk.folder}"
    return time.taking(seconds, breakdown={**time.breakdown, "disk": waits}, notes=(*time.notes, note))


def step_seconds(
    time: TimeForecast,
    placement: Placement,
    sizes: Sequence[Sizes],
    disk: DiskRate,
    *,
    micro_batches: float,
    backward: float,
) -> float:
    """Of a placed step. `backward`: what the backward pass computes, where the forward pass computes 1 (products: one forward,
    one for the gradient of what came in, one for that of the weights where they train, one more where it is computed again)."""
    step = _Step(placement, sizes, disk)
    optimizer = time.breakdown.get("optimizer", 0.0)
    passes = (time.step_seconds - optimizer) / micro_batches
    forward = passes / (1 + backward)
    count = max(min(int(micro_batches), MOST_SIMULATED), 1)

    def seconds(number: int) -> float:
        blocks = [block for n in range(number) for block in step.passes(forward, passes - forward, first=n == 0)]
        return run_blocks(blocks).seconds

    whole = seconds(count)
    if micro_batches > count:
        whole += (micro_batches - count) * (whole - seconds(count - 1))
    return whole + run_blocks(list(step.update(optimizer))).seconds


class _Step:
    """Rows as blocks with communication beside them."""

    def __init__(self, placement: Placement, sizes: Sequence[Sizes], disk: DiskRate) -> None:
        self._disk = disk
        self._rows: list[tuple[Sizes, RowPlaces]] = [(size, placement.table.row(size.name)) for size in sizes]
        self._weights = max(sum(size.weights for size in sizes), 1)
        self._trained = max(sum(size.state + size.gradients for size in sizes), 1)
        largest = max((size.weights for size, places in self._rows if places.weights != "device"), default=0)
        gradients = max((size.gradients for size, places in self._rows if places.gradients != "device"), default=0)
        self._ahead = placement.limit_bytes >= 2 * (largest + gradients)
        self._ahead_in_update = placement.update_limit_bytes >= 2 * placement.table.row_bytes(sizes)

    def passes(self, forward: float, backward: float, *, first: bool) -> Iterator[Block]:
        """Of a micro-batch."""
        for size, places in self._rows:
            yield self._block(forward * size.weights / self._weights, read=self._away(size, places, "weights"))
        for number, (size, places) in enumerate(reversed(self._rows)):
            read = 0 if number == 0 else self._away(size, places, "weights")  # those of the last row are still there
            gradients = self._away(size, places, "gradients")
            compute = backward * size.weights / self._weights
            yield self._block(compute, read=read + (0 if first else gradients), written=gradients)

    def update(self, seconds: float) -> Iterator[Block]:
        for size, places in self._rows:
            moved = [self._away(size, places, kind) for kind in ("weights", "state", "gradients")]
            compute = seconds * (size.state + size.gradients) / self._trained
            yield self._block(compute, read=sum(moved), written=moved[0] + moved[1], update=True)

    def _block(self, compute: float, *, read: int, written: int = 0, update: bool = False) -> Block:
        fetch, store = read / self._disk.read_bytes_per_second, written / self._disk.write_bytes_per_second
        if self._ahead_in_update if update else self._ahead:
            return Block(compute, gather=fetch, reduce=store)
        return Block(compute, inline=fetch + store)

    @staticmethod
    def _away(size: Sizes, places: RowPlaces, kind: str) -> int:
        return 0 if getattr(places, kind) == "device" else int(getattr(size, kind))
