"""The largest steps of a run, which its memory depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from sartor.data.pack import Batch


@dataclass(frozen=True, kw_only=True)
class LargestSteps:
    """Micro-batches of two steps that stand for all steps of a run."""

    first: Sequence[Batch]
    """Of the step that finds no optimizer state."""
    later: Sequence[Batch]
    """Of one that is as large as any that finds it; empty where there is none."""
    steps: int
    """How many steps the run has."""
    widths: int = 1
    """How many different widths its micro-batches have."""

    @classmethod
    def alike(cls, batches: Sequence[Batch], *, steps: int = 1000) -> Self:
        """All steps over these micro-batches."""
        return cls(first=batches, later=batches if steps > 1 else [], steps=steps)

    @property
    def traced(self) -> Sequence[Batch]:
        """Of the step that stands for most."""
        return self.later or self.first

    @property
    def largest(self) -> Sequence[Batch]:
        """The micro-batches of the step with most positions at once."""
        return max(self.first, self.later, key=lambda batches: max((batch.input_ids_RT.size for batch in batches), default=0))
