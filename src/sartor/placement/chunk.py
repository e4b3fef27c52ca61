"""Chunks: tensors that move together, and the states they may be in.

A chunk holds one kind of one row of the table: its weights, its gradients or its optimizer state. While it is away its tensors
stay what they are, but their storages are empty; it comes back into the same tensors, so that views of them, which autograd may
have saved, are valid again. Transitions that are not listed raise IllegalTransition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from sartor.job.units import format_bytes
from sartor.placement import away
from sartor.placement.tiers import Copy, Mover, Region, Tier


class State(StrEnum):
    """Of a chunk on the device."""

    FREE = "free"
    """Away: no memory on the device."""
    COMING = "coming"
    """Memory is taken, a copy is under way into it."""
    HOLD = "hold"
    """There, and not in use."""
    COMPUTE = "compute"
    """There, and in use: it may not go."""
    LEAVING = "leaving"
    """A copy of it is being written; then its memory is free."""


_LEGAL = {
    State.FREE: {State.COMING, State.HOLD},
    State.COMING: {State.HOLD, State.FREE},
    State.HOLD: {State.COMPUTE, State.FREE, State.LEAVING},
    State.COMPUTE: {State.HOLD},
    State.LEAVING: {State.FREE, State.HOLD},
}


class IllegalTransition(RuntimeError):
    """The engine has lost track of where a tensor is: an error in Sartor."""


class Change(NamedTuple):
    """A chunk has become something else."""

    seconds: float
    """Since the engine was made."""
    chunk: str
    state: str
    device_bytes: int

    def describe(self) -> str:
        """A line of the debug mode."""
        return f"{self.seconds:10.4f} s  {format_bytes(self.device_bytes):>10} on the device  {self.chunk}: {self.state}"


@dataclass(kw_only=True)
class Gauge:
    """Bytes of all chunks that are on the device, their peak, and whom to tell."""

    limit: int | None = None
    """Nothing is fetched ahead beyond it, and what is needed at once waits for what is leaving."""
    relieve: Callable[[], None] = lambda: None
    """Called when the system refuses memory, before it is asked again."""
    say: Callable[[Change], None] | None = None
    """Called with every change of a chunk."""
    level: Callable[[int], None] = lambda _: None
    """Called with the bytes, whenever they change."""
    device_bytes: int = 0
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self._start = time.perf_counter()

    def add(self, size: int) -> None:
        self.device_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.device_bytes)
        self.level(self.device_bytes)

    def over(self, size: int) -> int:
        """By how much `size` more bytes would be too many."""
        return 0 if self.limit is None else max(self.device_bytes + size - self.limit, 0)

    def note(self, chunk: str, state: State) -> None:
        if self.say is not None:
            self.say(Change(time.perf_counter() - self._start, chunk, state.value, self.device_bytes))


class Chunk:
    """Tensors of one row and kind, whose home is on a lower tier."""

    def __init__(
        self, name: str, tier: Tier, mover: Mover, gauge: Gauge, looked: Callable[[Sequence[Chunk]], None] | None = None
    ) -> None:
        """`looked`: brings chunks that somebody looks at while nothing computes with them; None: nobody can."""
        self.name, self.tier, self._mover, self._gauge, self._looked = name, tier, mover, gauge, looked
        self.tensors: list[Tensor] = []
        self._regions: list[Region] = []
        self._copies: list[Copy] = []
        self._dirty = False
        self.gate: Future[None] | None = None
        """What is changing it where it lives: an update on host cores."""
        self.state = State.FREE

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(region.size for region in self._regions)

    @property
    def here(self) -> bool:
        return self.state in (State.HOLD, State.COMPUTE)

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        """These tensors, which are on the device, are the chunk's from now on. Each has a storage of its own."""
        self.pass_gate()
        if self.state in (State.LEAVING, State.COMING):
            self.hold()
        before = self.size if self.here else 0
        regions = self._regions
        if [region.size for region in regions] != [_bytes(tensor) for tensor in tensors]:
            for region in regions:
                self.tier.free(region)
            regions = [self.tier.allocate(_bytes(tensor)) for tensor in tensors]
        self._release()
        self.tensors, self._regions, self._dirty = list(tensors), regions, False
        if self._looked is not None:
            for tensor in self.tensors:
                away.register(tensor, self)
        self._gauge.add(self.size - before)
        if not self.here:
            self._become(State.HOLD)

    def homes(self) -> Iterator[tuple[Tensor, Region]]:
        """Its tensors, and where each one lives."""
        return zip(self.tensors, self._regions, strict=True)

    def twin(self, homes: Sequence[tuple[Tensor, Region]], mover: Mover, gauge: Gauge) -> Chunk:
        """Other tensors, without memory so far, that live where some of its own do."""
        made = Chunk(self.name, self.tier, mover, gauge)
        made.tensors, made._regions = [tensor for tensor, _ in homes], [region for _, region in homes]
        return made

    def reserve(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Further tensors of these shapes and formats, which are away; what they hold is written part by part."""
        assert self.state is State.FREE, "what is on the device is adopted"
        if not self.tensors:
            for region in self._regions:
                self.tier.free(region)
            self._regions = []
        made = [empty_like(tensor, torch.device("cpu")) for tensor in like]
        for tensor in made:
            self._regions.append(self.tier.allocate(tensor.nbytes))
            if self._looked is not None:
                away.register(tensor, self)
        self.tensors += made
        return made

    def read_part(self, tensor: Tensor, first: int, count: int) -> Tensor:
        """A copy of some elements of one of its tensors, while it is away. Raises RunError where they could not be read."""
        made = torch.empty(count, dtype=tensor.dtype)
        self.tier.read(self._home(tensor), first * made.itemsize, made.nbytes, made.data_ptr())
        self._mover.read_bytes += made.nbytes
        return made

    def write_part(self, tensor: Tensor, first: int, values: Tensor) -> None:
        """Write some elements of one of its tensors, while it is away. Raises RunError."""
        self.tier.write(self._home(tensor), first * values.itemsize, values.nbytes, values.data_ptr())
        self._mover.written_bytes += values.nbytes

    def _home(self, tensor: Tensor) -> Region:
        assert self.state is State.FREE, "what is on the device is read there"
        wanted = tensor.untyped_storage()._cdata
        return next(region for own, region in self.homes() if own.untyped_storage()._cdata == wanted)

    def pass_gate(self) -> None:
        """Nothing changes it where it lives when this returns."""
        gate, self.gate = self.gate, None
        if gate is not None:
            gate.result()

    def make_room(self, size: int) -> None:
        """Wait for what is leaving, until `size` bytes have room or nothing is left to wait for."""
        while (over := self._gauge.over(size)) and self._mover.leaving_bytes:  # what is wanted again has left the list, and stays
            self._mover.settle(max(self._mover.leaving_bytes - over, 0))

    def fetch(self, *, ahead: bool = False) -> None:
        """Begin to bring it to the device, if it is away. `ahead`: only if there is room now."""
        changing = self.gate is not None and not self.gate.done()
        if self.state is not State.FREE or (ahead and (changing or self._gauge.over(self.size))):
            return
        self.pass_gate()
        self.make_room(self.size)
        try:
            self._allocate()
        except (RuntimeError, MemoryError):
            if ahead:
                return
            self._gauge.relieve()
            self._allocate()
        self._gauge.add(self.size)
        self._become(State.COMING)
        for tensor, region in self.homes():
            if region.size:
                self._copies += self._mover.read(self.tier, region, tensor.untyped_storage())

    def _allocate(self) -> None:
        """Memory for all tensors, or for none."""
        try:
            for tensor, region in self.homes():
                tensor.untyped_storage().resize_(region.size)
        except (RuntimeError, MemoryError):
            for tensor in self.tensors:
                tensor.untyped_storage().resize_(0)
            raise

    def hold(self) -> None:
        """It is on the device when this returns. Raises RunError where it could not be read."""
        if self.here:
            return
        self.fetch()
        self._arrive()
        self._become(State.HOLD)

    def _arrive(self) -> None:
        """Wait for what is under way. Where it fails, what was coming is away again, and what was leaving has stayed."""
        copies, self._copies = self._copies, []
        failed = next((error for error in [copy.exception() for copy in copies] if error is not None), None)
        if failed is None:
            return
        if self.state is State.COMING:
            self._become(State.FREE)
            self._empty()
        elif self.state is State.LEAVING:
            self._become(State.HOLD)
            self._dirty = True
        raise failed

    def begin(self) -> None:
        """It is in use when this returns."""
        self.hold()
        if self.state is not State.COMPUTE:
            self._become(State.COMPUTE)

    def end(self) -> None:
        """It is not in use any more."""
        self._become(State.HOLD)

    def drop(self) -> None:
        """Free its memory: what its home has is the same, or becomes it where somebody wrote to it."""
        if self.state is State.COMING:
            self.hold()
        if self._dirty:
            self.store()
            return
        self._become(State.FREE)
        self._empty()

    def store(self) -> None:
        """Write it to its home, then free its memory."""
        self._become(State.LEAVING)
        self._dirty = False
        copies: list[Copy] = []
        for tensor, region in self.homes():
            if region.size:
                copies += self._mover.write(self.tier, region, tensor.untyped_storage())
        self._copies = copies
        self._mover.leaving(copies, self.size, lambda: self._left(copies))

    def _left(self, copies: list[Copy]) -> None:
        if self._copies is copies and self.state is State.LEAVING:  # else it was wanted again before it had gone
            self._copies = []
            self._become(State.FREE)
            self._empty()

    def _empty(self) -> None:
        for tensor in self.tensors:
            tensor.untyped_storage().resize_(0)
        self._gauge.add(-self.size)

    def forget(self) -> None:
        """Its contents are of no use any more; its tensors are let go, its home stays reserved."""
        if self.state in (State.LEAVING, State.COMING):
            self.hold()
        if self.state is State.COMPUTE:
            self.end()
        if self.here:
            self._become(State.FREE)
            self._gauge.add(-self.size)
        self._dirty = False
        self._release()

    def _release(self) -> None:
        if self._looked is not None:
            for tensor in self.tensors:
                away.forget(tensor)
        self.tensors = []

    def leave_for_good(self) -> None:
        """It is on the device, and its tensors are ordinary ones, when this returns."""
        self.hold()
        self._release()

    def look(self, others: Sequence[Chunk]) -> None:
        """It is on the device when this returns, and so are the others, until a pass or somebody who looks at something else."""
        assert self._looked is not None, "only then its tensors know it"
        self._looked((self, *others))

    def changed(self) -> None:
        """Somebody wrote to it, while it is on the device."""
        self._dirty = True

    def _become(self, state: State) -> None:
        if state not in _LEGAL[self.state]:
            raise IllegalTransition(f"{self.name} is {self.state}, and cannot become {state}")
        if self._looked is not None and State.COMPUTE in (state, self.state):
            for tensor in self.tensors:
                away.show(tensor) if state is State.COMPUTE else away.hide(tensor)
        self.state = state
        self._gauge.note(self.name, state)


class Visits:
    """Chunks that are brought because somebody looks at them: they stay until others are looked at."""

    def __init__(self) -> None:
        self._current: list[Chunk] = []

    def hold(self, *chunks: Chunk) -> None:
        """The chunks are on the device when this returns, until others are wanted."""
        if all(chunk in self._current or chunk.here for chunk in chunks):
            return
        self.leave()
        for chunk in chunks:
            if not chunk.here:
                chunk.hold()
                self._current.append(chunk)

    def leave(self) -> None:
        """Nobody looks any more."""
        current, self._current = self._current, []
        for chunk in current:
            if chunk.state is State.HOLD:
                chunk.drop()


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def own_storage(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it that shares its storage with nobody and fills it."""
    storage = tensor.untyped_storage()
    whole = storage.nbytes() == tensor.numel() * tensor.element_size()
    if whole and storage.resizable():
        return tensor
    return tensor.detach().clone()


def empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    """The same shape, strides and format without memory."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    made.untyped_storage().resize_(0)
    return made
