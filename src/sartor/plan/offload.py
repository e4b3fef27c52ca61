"""A strategy for one accelerator whose weights, gradients, optimizer state and activations do not all stay on it.

Candidates differ in the micro-batch and in recomputation; of each, as little leaves the device as lets it fit
(`sartor.plan.levels`), and what main memory cannot take goes to disk. All are estimated, memory and time; the fastest are then
traced, and the replay of the device's allocator says how much has to leave.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sartor.errors import JobError
from sartor.plan.estimate import Estimator
from sartor.plan.offload_fit import Fitted, fit
from sartor.plan.offload_ground import Ground, Missing
from sartor.plan.offload_time import Work, offloaded_seconds, surroundings_of
from sartor.plan.setting import Setting
from sartor.plan.strategy import Strategy
from sartor.plan.table import Table
from sartor.plan.timing import Timing
from sartor.predict import MemoryForecast
from sartor.predict.time import TimeForecast

MOST_TRACED = 3
"""Candidates that are traced, at most."""


@dataclass(frozen=True, kw_only=True)
class Offloaded:
    """What was found."""

    strategy: Strategy
    forecast: MemoryForecast
    time: TimeForecast | None


class Offload:
    """The search, of one setting."""

    def __init__(self, setting: Setting, timing: Timing | None = None, estimator: Estimator | None = None) -> None:
        self.setting, self.timing, self.estimator = setting, timing, estimator
        self.ground, self.around = Ground(setting), surroundings_of(setting.machine)
        self.missing = Missing()
        """What was short where nothing was found."""

    def find(self, strategies: Sequence[Strategy]) -> Offloaded | None:
        """The fastest of these, each with as much elsewhere as it needs; without rates, the one that needs least memory. None
        where none fits."""
        candidates = list(dict.fromkeys(dataclasses.replace(strategy, recomputed=None) for strategy in strategies))
        smallest = min(candidates, key=lambda strategy: (strategy.micro_batch, not strategy.recompute))
        ranked = self.ranked(candidates)[:MOST_TRACED]
        if smallest not in [strategy for _, strategy in ranked]:
            ranked.append((math.inf, smallest))
        best: Offloaded | None = None
        for seconds, strategy in ranked:
            if best is not None and _seconds(best) <= seconds:
                break
            found = self.exact(strategy)
            if found is not None and (best is None or _seconds(found) < _seconds(best)):
                best = found
        return best

    def ranked(self, strategies: Sequence[Strategy]) -> list[tuple[float, Strategy]]:
        """Those that should fit, with the seconds of a step, the fastest first; nothing where rates are not known."""
        if self.estimator is None or self.around is None:
            return []
        found = []
        for strategy in strategies:
            table = self._estimated(strategy)
            if table is not None:
                found.append((self._step_seconds(strategy, table, self.estimator.time(strategy)), strategy))
        return sorted(found, key=lambda entry: entry[0])

    def _estimated(self, strategy: Strategy) -> Table | None:
        """The table that should do; None where none does."""
        assert self.estimator is not None, "estimates are asked for"
        ground, accumulated = self.ground, self.ground.accumulates(strategy)
        passes, update = self.estimator.others(strategy)
        room = ground.tensor_room - ground.outside
        for level in ground.levels(accumulated):
            if level.kept_bytes + max(level.moving_bytes + passes, update) <= room:
                return ground.spilled(level.table, accumulated=accumulated)
        return None

    def exact(self, strategy: Strategy) -> Offloaded | None:
        """This one, traced."""
        try:
            found = fit(self.ground, strategy)
        except JobError:
            raise
        except Exception as error:  # a foreign model's code under tracing, or rows that its trace does not show
            self.missing = Missing(untraced=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return None
        if isinstance(found, Missing):
            self.missing = found
            return None
        return Offloaded(strategy=found.strategy, forecast=found.forecast, time=self._time(found))

    def _time(self, found: Fitted) -> TimeForecast | None:
        """Of a step as it is placed; None where rates are not known."""
        if self.timing is None or self.around is None:
            return None
        strategy, placement = found.strategy, found.strategy.placement
        assert placement is not None, "it is placed"
        whole = self.timing.of_forecast(dataclasses.replace(strategy, placement=None), found.forecast)
        seconds = self._step_seconds(strategy, placement.table, whole, ahead=found.ahead, activations=found.activations)
        sizes = self.ground.sizes(self.ground.accumulates(strategy))
        stays = sum(size.state for size in sizes if placement.table.row(size.name).state == "device")
        optimizer = whole.breakdown["optimizer"] * stays / max(sum(size.state for size in sizes), 1)
        busy = whole.step_seconds - whole.breakdown["optimizer"] + optimizer
        notes = (*whole.notes, *self.around.notes, *(self.around.disk_notes if placement.disk_bytes else ()))
        return whole.taking(
            seconds, breakdown={**whole.breakdown, "optimizer": optimizer, "offload": max(seconds - busy, 0.0)}, notes=notes
        )

    def _step_seconds(
        self,
        strategy: Strategy,
        table: Table,
        whole: TimeForecast,
        *,
        ahead: bool = True,
        activations: Sequence[int] = (),
    ) -> float:
        assert self.timing is not None, "rates are known"
        assert self.around is not None, "rates are known"
        accumulated = self.ground.accumulates(strategy)
        backward = (2.0 if self.setting.job.method == "full" else 1.0) + strategy.recompute
        return offloaded_seconds(
            Work.of(whole, micro_batches=self.timing.workload(strategy).micro_batches, backward=backward),
            table,
            self.ground.sizes(accumulated),
            self.around,
            gradient_width=self.ground.gradient_width(accumulated=accumulated),
            ahead=ahead,
            activations=activations,
        )


def _seconds(found: Offloaded) -> float:
    return math.inf if found.time is None else found.time.step_seconds
