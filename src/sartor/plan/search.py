"""The search: every candidate estimated, the fastest ones that should fit forecast, the first that fits taken.

Estimates (`sartor.plan.estimate`) take milliseconds and only decide in which order candidates are forecast, and which are not:
those far larger than the device, and those slower than one that fits. What is chosen has been forecast like any plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sartor.errors import JobError
from sartor.job.units import format_bytes, format_seconds
from sartor.methods import apply
from sartor.model import short_skeleton, skeleton
from sartor.parallel import Layout
from sartor.parallel.tensor import check_split
from sartor.plan.estimate import Estimator
from sartor.plan.forecast import forecast_of
from sartor.plan.offload import Offload
from sartor.plan.offload_ground import Missing, asks_for_offload, cannot_offload
from sartor.plan.partial import FITS, fewest, guess
from sartor.plan.plan import Rejected
from sartor.plan.processes import possible_processes
from sartor.plan.setting import Setting
from sartor.plan.space import candidates
from sartor.plan.strategy import Strategy
from sartor.plan.timing import Timing, rates_of
from sartor.predict import MemoryForecast
from sartor.predict.ledger import Ledger
from sartor.predict.shapes import NotComparable
from sartor.predict.time import TimeForecast
from sartor.predict.verdict import TIGHT_SHARE
from sartor.predict.whole import treats_layers_alike

HOPELESS = 1.02
"""A candidate whose estimate is so many times what there is is not forecast. Estimates are of tensors alone: of those compared,
none was above what the process was then forecast to need."""
AS_FAST = 1.03
"""On a CPU, candidates estimated to take so many times as long as the fastest count as equal: estimates of examples of different
lengths are so close to the forecasts. Of these the one with the largest micro-batches is taken. It has the fewest operators, and
what one costs beside its arithmetic is what other work on the machine changes most."""
LEAST_FORWARD_SHARE = 0.2
"""Of a step, what computing the forward pass again adds at least: it is a third of the products, half with adapters."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the search found. The forecast's verdict says whether it fits."""

    strategy: Strategy
    forecast: MemoryForecast
    time: TimeForecast | None
    rejected: tuple[Rejected, ...]
    note: str = ""
    missing: Missing | None = None
    """What was short even with all in main memory or on disk that can be there."""


@dataclass(frozen=True, kw_only=True)
class _Estimated:
    strategy: Strategy
    seconds: float
    bytes: int
    forecast: MemoryForecast | None = None
    """Where it was made already."""


def search(setting: Setting, row_capacity: int) -> Choice:
    """The fastest candidate that fits, else the fastest that is tight, else the smallest. Raises JobError.

    One process a NUMA cluster comes first, whatever the forecast of its time: rates are those of the machine as a whole, and do
    not know how much of its memory is far from a core.
    """
    rejected: tuple[Rejected, ...] = ()
    for processes in possible_processes(setting.job, setting.machine):
        choice = _search(setting, row_capacity, processes)
        choice = dataclasses.replace(choice, rejected=(*rejected, *choice.rejected))
        if choice.forecast.verdict != "does not fit":
            break
        failed = Rejected(strategy=choice.strategy, reason=choice.forecast.reason, process_bytes=choice.forecast.process_bytes)
        rejected = (*choice.rejected, failed)
    return choice


def _search(setting: Setting, row_capacity: int, processes: int) -> Choice:
    """Among strategies of so many processes."""
    everything, impossible = _possible(setting, list(candidates(setting, row_capacity, processes)))
    rates = rates_of(setting.machine)
    timing = None if rates is None else Timing(setting, rates)
    if timing is None or len(everything) == 1:
        walk = _Walk(setting, timing, rejected=impossible)
        if asks_for_offload(setting):
            return walk.offloaded(everything) or walk.nowhere(everything)
        return walk.through(everything)
    estimator = Estimator(setting, timing)
    walk = _Walk(setting, timing, estimator, rejected=impossible)
    keeping = [strategy for strategy in everything if not strategy.recompute]
    again = [strategy for strategy in everything if strategy.recompute]
    try:
        if asks_for_offload(setting):
            walk.estimate(everything)
            return walk.offloaded(everything) or walk.nowhere(everything)
        walk.estimate(keeping)
        if keeping and (choice := walk.first_fit(beyond=(1 + LEAST_FORWARD_SHARE) * walk.fastest if again else None)):
            return choice
        walk.estimate(again)
        walk.estimate_partial(again)
    except JobError:
        raise
    except Exception as error:  # a foreign model's code under tracing, or a step that is not linear in its rows
        reason = (
            str(error) if isinstance(error, NotComparable) else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        )
        return dataclasses.replace(
            _Walk(setting, timing, rejected=impossible).through(everything), note=f"strategies are not ranked by time: {reason}"
        )
    return walk.first_fit() or walk.offloaded(everything) or walk.last_resort()


def _possible(setting: Setting, strategies: list[Strategy]) -> tuple[list[Strategy], list[Rejected]]:
    """Without the layouts that the job does not ask for and this model cannot have."""
    if setting.job.strategy.tensor != "auto" or all(strategy.layout.tensor == 1 for strategy in strategies):
        return strategies, []
    dtype = setting.precision.load_dtype(adapter=setting.method.adapter)
    alike = treats_layers_alike(setting.job)
    model = short_skeleton(setting.source, dtype=dtype)[0] if alike else skeleton(setting.source, dtype=dtype)
    model = apply(model, setting.job, meta=True, kind=setting.machine.device.kind)

    @cache
    def reason(tensor: int, sequence: bool) -> str:
        try:
            check_split(model, Layout(tensor=tensor, sequence=sequence))
        except JobError as error:
            return str(error)
        return ""

    layouts = [strategy.layout for strategy in strategies]
    reasons = [reason(layout.tensor, layout.sequence) if layout.tensor > 1 else "" for layout in layouts]
    impossible = [Rejected(strategy=strategy, reason=why) for strategy, why in zip(strategies, reasons, strict=True) if why]
    return [strategy for strategy, why in zip(strategies, reasons, strict=True) if not why], impossible


class _Walk:
    """Candidates that were estimated, forecast, and rejected so far."""

    def __init__(
        self,
        setting: Setting,
        timing: Timing | None,
        estimator: Estimator | None = None,
        rejected: Sequence[Rejected] = (),
    ) -> None:
        self.setting, self.timing, self.estimator = setting, timing, estimator
        self.room = setting.machine.device.total_bytes
        self.impossible = tuple(rejected)
        self.rejected: list[Rejected] = []
        self.tight: tuple[Strategy, MemoryForecast] | None = None
        self.worst: tuple[Strategy, MemoryForecast] | None = None
        self.waiting: list[_Estimated] = []
        self.known: dict[Strategy, _Estimated] = {}
        self.missing: Missing | None = None

    @property
    def fastest(self) -> float:
        """Seconds of the fastest candidate, whether it fits or not."""
        return min(entry.seconds for entry in self.waiting)

    def estimate(self, strategies: list[Strategy]) -> None:
        assert self.estimator is not None
        for strategy in strategies:
            time, size = self.estimator.time(strategy), self.estimator.bytes(strategy)
            self.known[strategy] = entry = _Estimated(strategy=strategy, seconds=time.step_seconds, bytes=size)
            self.waiting.append(entry)
        self._sort()

    def _sort(self) -> None:
        self.waiting.sort(key=lambda entry: (entry.seconds, entry.bytes))

    def estimate_partial(self, again: Sequence[Strategy]) -> None:
        """Of each candidate that recomputes all blocks: the same with about as many as it takes. How many is found out when its
        turn comes. On one device only: over several, estimates of time are not close enough to tell such candidates apart."""
        blocks = self.setting.blocks
        for strategy in again:
            none, full = self._without(strategy), self.known[strategy]
            room = self.room // strategy.processes
            if none is None or blocks < 2 or strategy.layout.devices > 1 or full.bytes > HOPELESS * room:
                continue
            count = guess(none.bytes, full.bytes, int(TIGHT_SHARE * room), blocks)
            if count is not None:
                self.estimate([dataclasses.replace(strategy, recomputed=count)])

    def _without(self, strategy: Strategy) -> _Estimated | None:
        """The candidate that differs from this one by keeping all activations."""
        return self.known.get(dataclasses.replace(strategy, recompute=False, recomputed=None))

    def _narrow(self, entry: _Estimated) -> None:
        """Find out in how many blocks activations have to be recomputed, and put that candidate in its place."""
        assert self.estimator is not None, "its numbers are estimates"
        strategy, blocks, traces = entry.strategy, self.setting.blocks, dict[tuple[Any, ...], Ledger]()
        none, full = self._without(strategy), self.known[dataclasses.replace(strategy, recomputed=None)]
        assert none is not None, "it lies between two others"
        assert strategy.recomputed is not None, "it is partial"
        found = fewest(
            lambda count: forecast_of(self.setting, dataclasses.replace(strategy, recomputed=count), known=traces),
            blocks=blocks,
            start=strategy.recomputed,
            freed=(none.bytes - full.bytes) / blocks,
        )
        if found is None:
            return
        exact = dataclasses.replace(strategy, recomputed=found[0])
        seconds, size = self.estimator.time(exact).step_seconds, self.estimator.bytes(exact)
        self.waiting.append(_Estimated(strategy=exact, seconds=seconds, bytes=size, forecast=found[1]))
        self._sort()

    def first_fit(self, *, beyond: float | None = None) -> Choice | None:
        """Forecast in order of time until one fits. `beyond`: slower ones wait, since others may be faster than they are."""
        while self.waiting and (beyond is None or self.waiting[0].seconds <= beyond):
            entry = self._take()
            if entry.strategy.recomputed is not None and entry.forecast is None and self._without(entry.strategy):
                self._narrow(entry)
                continue
            room = self.room // entry.strategy.processes
            if entry.bytes > HOPELESS * room:
                self._reject(entry.strategy, f"does not fit: about {format_bytes(entry.bytes)} of {format_bytes(room)}")
                self.rejected[-1] = dataclasses.replace(self.rejected[-1], step_seconds=entry.seconds)
            else:
                forecast = entry.forecast or self._forecast(entry.strategy)
                if forecast.verdict in FITS:
                    self._note_slower(entry)
                    return self._choice(entry.strategy, forecast)
            if beyond is not None and self.setting.blocks and entry.strategy.layout.devices == 1:
                # with one block recomputed it may be the fastest
                beyond = min(beyond, (1 + LEAST_FORWARD_SHARE / self.setting.blocks) * entry.seconds)
        return None

    def _take(self) -> _Estimated:
        """The next candidate to forecast, of those waiting."""
        if self.setting.machine.device.kind != "cpu":
            return self.waiting.pop(0)
        as_fast = [entry for entry in self.waiting if entry.seconds <= AS_FAST * self.waiting[0].seconds]
        entry = min(as_fast, key=lambda entry: (entry.strategy.recompute, -entry.strategy.micro_batch))
        self.waiting.remove(entry)
        return entry

    def through(self, strategies: list[Strategy]) -> Choice:
        """Without times: candidates in their own order."""
        for strategy in strategies:
            forecast = self._forecast(strategy)
            if forecast.verdict in FITS:
                return self._choice(strategy, forecast)
        return self.offloaded(strategies) or self.last_resort()

    def offloaded(self, strategies: Sequence[Strategy]) -> Choice | None:
        """Where nothing fits on an accelerator by itself: the fastest of these that fits with some of it elsewhere."""
        setting = self.setting
        if self.tight or setting.job.strategy.placement == "device" or cannot_offload(setting):
            return None
        search = Offload(setting, self.timing, self.estimator)
        found = search.find(strategies)
        if found is None:
            self.missing = search.missing
            return None
        rejected = (*self.rejected, *self.impossible)
        return Choice(strategy=found.strategy, forecast=found.forecast, time=found.time, rejected=rejected)

    def nowhere(self, strategies: Sequence[Strategy]) -> Choice:
        """Where everything was to be elsewhere, and no candidate fits that way."""
        smallest = min(strategies, key=lambda strategy: (strategy.micro_batch, not strategy.recompute))
        forecast = forecast_of(self.setting, smallest)
        reason = "needs more than there is where it was to be placed"
        return self._choice(smallest, dataclasses.replace(forecast, verdict="does not fit", reason=reason))

    def last_resort(self) -> Choice:
        """What is tight, else what failed last, else the smallest by its estimate."""
        found = self.tight or self.worst
        if self.tight is None and self.estimator is not None:
            smallest = min((entry.strategy for entry in self.rejected), key=self._size)
            if found is None or found[0] != smallest:
                found = smallest, forecast_of(self.setting, smallest)
        assert found is not None, "what was not estimated was forecast"
        self.rejected = [entry for entry in self.rejected if entry.strategy != found[0]]
        return self._choice(*found)

    def _size(self, strategy: Strategy) -> int:
        return 0 if self.estimator is None else self.estimator.bytes(strategy)

    def _forecast(self, strategy: Strategy) -> MemoryForecast:
        forecast = forecast_of(self.setting, strategy)
        if forecast.verdict == "tight" and self.tight is None:
            self.tight = strategy, forecast
        if forecast.verdict == "does not fit":
            self.worst = strategy, forecast
        if forecast.verdict not in FITS:
            self._reject(strategy, f"{forecast.verdict}: {forecast.reason}", forecast)
        return forecast

    def _reject(self, strategy: Strategy, reason: str, forecast: MemoryForecast | None = None) -> None:
        size = None if forecast is None else forecast.process_bytes
        self.rejected.append(Rejected(strategy=strategy, reason=reason, process_bytes=size))

    def _note_slower(self, chosen: _Estimated) -> None:
        """What was not forecast, because something faster fits."""
        for entry in self.waiting:
            slower = entry.seconds / chosen.seconds - 1
            compared = f"{slower:.0%} slower" if slower >= 0 else "about as fast, in smaller micro-batches"
            reason = f"{compared}: about {format_seconds(entry.seconds)} a step"
            self.rejected.append(Rejected(strategy=entry.strategy, reason=reason, step_seconds=entry.seconds))

    def _choice(self, strategy: Strategy, forecast: MemoryForecast) -> Choice:
        time = None
        if self.timing is not None and forecast.stages:
            time = self.timing.of_forecast(strategy, forecast)
        rejected = (*self.rejected, *self.impossible)
        return Choice(strategy=strategy, forecast=forecast, time=time, rejected=rejected, missing=self.missing)
