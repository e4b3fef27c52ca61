"""Times calls on a device so that what else runs on the machine disturbs as little as possible."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]
_BATCH_SECONDS = 5e-4
"""Calls are timed in batches about so long: reading the clock costs nothing, and most batches are not interrupted."""
_LEAST_BATCHES = 3
_AGREEMENT = 1.1
_PATIENCE = 4
"""Times the budget, where the lowest times do not agree."""


class Clock:
    """Times calls on `device`. Sections of a calibration have a time each: `late` says when a section should end."""

    def __init__(self, device: torch.device, *, limit_seconds: float = float("inf")) -> None:
        self.device = device
        self._end = self._deadline = time.perf_counter() + limit_seconds

    def section(self, seconds: float) -> None:
        """What follows should be done after so many seconds, and by the end of all."""
        self._deadline = min(time.perf_counter() + seconds, self._end)

    @property
    def late(self) -> bool:
        return time.perf_counter() > self._deadline

    def wait(self) -> None:
        """Until the device has done everything it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def once(self, call: Call, times: int = 1) -> float:
        """Seconds of `times` calls together."""
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            call()
        self.wait()
        return time.perf_counter() - start

    def seconds(self, call: Call, budget: float = 0.03) -> float:
        """Of one call, warm: the median of batches measured for `budget` seconds.

        The lowest times are what the machine does when it is left alone; where others share it (virtual machines), steps take up
        to a fifth longer than rates by these would have it. Where not even the three lowest agree, measuring goes on for a while.
        """
        call()
        start = time.perf_counter()
        singly = [self.once(call) for _ in range(3)]
        times = max(1, int(_BATCH_SECONDS / max(min(singly), 1e-8)))
        batches = singly if times == 1 else []
        while (spent := time.perf_counter() - start) < _PATIENCE * budget:
            if spent >= budget and len(batches) >= _LEAST_BATCHES and sorted(batches)[2] <= _AGREEMENT * min(batches):
                break
            batches.append(self.once(call, times) / times)
        return max(statistics.median_low(batches), 1e-9)
