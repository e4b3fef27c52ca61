"""The ledger: every allocation and release of a traced training step, and what they add up to."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from sartor.kernels.loss import Extent
from sartor.predict.operations import Operations

MOST_MODULES = 12
_INDEX = re.compile(r"\.\d+(?=\.|$)")

PAGED = "paged"
"""Kind of what lives in CUDA's unified memory, beside the device's allocator."""
OUTSIDE = -1
"""Unit of what belongs to none."""
KINDS = ("weights", "gradients", "optimizer", "activations")


class Event(NamedTuple):
    """A storage comes to life (`size_bytes` > 0) or dies (< 0). A tuple: there are hundreds of thousands of them."""

    storage: int
    size_bytes: int
    phase: str
    module: str = ""
    """Path of the module whose forward (or recomputation) was running; empty in backward and update."""
    unit: int = OUTSIDE
    """Tag of the repeated unit (`sartor.model.regions`) that was running, or whose parameter was at work; OUTSIDE of units.
    In the ledger of a whole model, the unit's place among all of its units."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The fullest moment: how much, when, and of what."""

    total_bytes: int
    phase: str
    by_kind: dict[str, int]
    by_module: dict[str, int] = field(default_factory=dict)
    """What is live, by the module that made it, largest first; blocks are counted together (`layers.*`)."""
    kind: str = ""
    """The kind that holds most."""
    module: str = ""
    """The module that was running."""


@dataclass(kw_only=True)
class Ledger:
    """Events in order. Storages are activations (and other temporaries) until something says what they are."""

    events: list[Event] = field(default_factory=list)
    kinds: dict[int, str] = field(default_factory=dict)
    workspaces: dict[int, Extent] = field(default_factory=dict)
    """Storages whose size is no straight line in the rows of a micro-batch, and what it follows from."""
    operations: Operations = field(default_factory=Operations)
    """What the step computes; `events` are what it allocates."""

    paged_bytes: int = 0
    """What is paged, once it has been set apart."""

    def set_paged_apart(self) -> Ledger:
        """The ledger of what the device's allocator gives; how much is paged beside it is said in bytes."""
        paged = {storage for storage, kind in self.kinds.items() if kind == PAGED}
        if paged:
            self.paged_bytes = sum(event.size_bytes for event in self.events if event.storage in paged)
            self.events = [event for event in self.events if event.storage not in paged]
            self.kinds = {storage: kind for storage, kind in self.kinds.items() if storage not in paged}
        return self

    def peak(self) -> Peak:
        """The highest sum of live bytes, with its parts."""
        live = best = 0
        at = 0
        for place, event in enumerate(self.events):
            live += event.size_bytes
            if live > best:
                best, at = live, place
        by_kind: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        by_module: Counter[str] = Counter()
        makers: dict[int, str] = {}
        for event in self.events[: at + 1]:
            by_kind[self.kinds.get(event.storage, "activations")] += event.size_bytes
            if event.storage not in makers:
                makers[event.storage] = _maker(event)
            by_module[makers[event.storage]] += event.size_bytes
        if not self.events:
            return Peak(total_bytes=0, phase="", by_kind=dict(by_kind))
        last = self.events[at]
        return Peak(
            total_bytes=best,
            phase=last.phase,
            by_kind=dict(by_kind),
            by_module={module: size for module, size in by_module.most_common(MOST_MODULES) if size > 0},
            kind=max(by_kind, key=by_kind.__getitem__),
            module=last.module,
        )


def _maker(event: Event) -> str:
    """Who made a storage: a module, its index left out, or what runs outside of modules."""
    return _named(event.module, event.phase)


@functools.cache
def _named(module: str, phase: str) -> str:
    if module:
        return _INDEX.sub(".*", module.removeprefix("base_model.model."))  # PEFT's wrapping says nothing
    stage = phase.partition(": ")[2]
    return {"": "weights", "update": "optimizer update", "forward and backward": "loss and backward"}.get(stage, stage)
