"""Which examples make which step: decided by the seed alone, so that a resumed run goes on where it stopped."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """Steps of `global_batch` examples; every epoch is a fresh permutation, its last step may be smaller."""

    examples: int
    global_batch: int
    epochs: float
    max_steps: int | None
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.examples / self.global_batch)

    @property
    def total_steps(self) -> int:
        steps = max(1, math.ceil(self.epochs * self.steps_per_epoch))
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def epoch_of(self, step: int) -> float:
        """How many passes are done after `step` steps."""
        return step / self.steps_per_epoch

    def indices(self, step: int) -> np.ndarray:
        """The examples of step `step` (from 0), int, (at most global_batch,)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._permutation(epoch)[place * self.global_batch : (place + 1) * self.global_batch]

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.examples)
