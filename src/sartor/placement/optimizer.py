"""The optimizer step of a placed model: row by row, on tensors that are brought for it.

Any optimizer of `torch.optim` will do whose update of a parameter looks at this parameter alone: it is asked for a step in which
only the row's parameters have gradients, and leaves the others as they are. So the numbers are those of one step for all.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from sartor.kernels.adam import RESIDUAL
from sartor.placement.chunk import Chunk, State, own_storage
from sartor.placement.engine import Engine
from sartor.placement.gradients import AwayGradient
from sartor.placement.host import Before, HostOptimizer
from sartor.placement.live import LiveRow
from sartor.placement.slices import Slices, can_slice, kept_bytes


def _put_back(chunks: Sequence[Chunk]) -> None:
    """Nothing computes with these any more; they are as they were."""
    for chunk in chunks:
        if chunk.state is State.COMPUTE:
            chunk.end()
        if chunk.state in (State.HOLD, State.COMING):
            chunk.drop()


def _stateless(live: LiveRow) -> bool:
    """Whether the optimizer has kept nothing of the row yet."""
    return live.state is not None and not live.state.tensors


class StreamedOptimizer:
    """Takes the steps of an optimizer whose parameters a placement moves."""

    def __init__(self, engine: Engine, optimizer: torch.optim.Optimizer) -> None:
        self._engine, self.optimizer = engine, optimizer
        self._parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self._staying: list[nn.Parameter] = []
        self._host = HostOptimizer(engine, optimizer)
        self._overlap = False
        self._scaled: set[nn.Parameter] = set()
        """Of an update that failed: gradients that stay, and went through `before`."""
        self._torn = False
        self.rearranged()

    def rearranged(self) -> None:
        """Where things live has changed: what the optimizer keeps goes there."""
        placed = {id(p) for live in self._engine.moving for p in live.trained}
        self._staying = [p for p in self._parameters if id(p) not in placed]
        self._host.adopt(self._on_host)
        for live in self._engine.moving:
            self.keep_state(live)
            self._engine.mover.settle()

    @cached_property
    def _kept_bytes(self) -> float:
        """Of an element, once there has been a step."""
        return kept_bytes(self.optimizer)

    @property
    def _on_host(self) -> list[LiveRow]:
        return [live for live in self._engine.moving if live.on_host]

    def release(self) -> None:
        """When the model is not placed any more: what the optimizer keeps is on the device, too."""
        self._host.release(self._on_host)

    @property
    def torn(self) -> bool:
        """Whether an update has failed after it had changed some of the tensors of a row."""
        return self._torn or self._host.failed

    def step(self, before: Before | None = None, *, keep_gradients: bool = False, overlap: bool = False) -> None:
        """Update all parameters that have gradients. `before` is called with the gradients of every part of the update.

        `keep_gradients`: for callers that look at them afterwards; else they are let go. `overlap`: updates on host cores may go
        on while the next forward pass computes; who looks at weights without one calls `Engine.finish_updates` first. Where
        memory runs out, what is not updated keeps its gradient, and another call goes on with it, unless the update is `torn`.
        Raises RunError of the tiers.
        """
        self._engine.visits.leave()
        self._overlap = overlap
        with self._engine.updating():
            self._step(before, keep_gradients)
        self._scaled.clear()

    def _step(self, before: Before | None, keep_gradients: bool) -> None:
        gradients = {p: p.grad for p in self._parameters if p.grad is not None}
        left = dict(gradients) if keep_gradients else gradients
        for parameter in gradients:
            parameter.grad = None
        try:
            rows = [live for live in self._engine.moving if any(p in gradients for p in live.trained)]
            self._host.begin([live for live in rows if live.on_host])
            if rows:
                self._engine.tidy(rows[:1])
                self._expect(rows[0], gradients)
            staying = {p: gradients[p] for p in self._staying if p in gradients}
            if staying:
                self._update(staying, before)
                for parameter in list(staying):
                    del staying[parameter], left[parameter]
            for live, follower in zip_longest(rows, rows[1:]):
                self._row(live, follower, left, before, keep_gradients)
        finally:
            for parameter, gradient in (gradients if keep_gradients else left).items():
                parameter.grad = gradient

    def _update(self, gradients: dict[nn.Parameter, Tensor], before: Before | None) -> None:
        """Of these parameters; of an update that fails, it is known whether it has changed anything."""
        here = {p: g.held if isinstance(g, AwayGradient) else g for p, g in gradients.items()}
        for parameter, gradient in here.items():
            parameter.grad = gradient
        if before is not None:
            before([g for p, g in here.items() if p not in self._scaled], self.optimizer)
            self._scaled |= {p for p, g in gradients.items() if not isinstance(g, AwayGradient)}
        kept = {p: set(self.optimizer.state.get(p, ())) for p in here}
        versions = self._versions(kept)
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError):
            self._torn = self._versions(kept) != versions
            for parameter, keys in kept.items():
                state = self.optimizer.state[parameter]
                for key in set(state) - keys:
                    del state[key]
            raise
        finally:
            for parameter in here:
                parameter.grad = None

    def give_up(self) -> None:
        """An update that failed is not gone on with."""
        self._torn = False
        self._scaled.clear()

    def _versions(self, kept: dict[nn.Parameter, set[str]]) -> list[int]:
        """Other numbers where parameters, or what was kept of them, have changed."""
        states = (self.optimizer.state[p][key] for p, keys in kept.items() for key in sorted(keys))
        return [tensor._version for tensor in (*kept, *states) if isinstance(tensor, Tensor)]

    def _expect(self, live: LiveRow, gradients: dict[nn.Parameter, Tensor]) -> None:
        for chunk in self._chunks(live, gradients):
            chunk.fetch(ahead=True)

    def _chunks(self, live: LiveRow, gradients: dict[nn.Parameter, Tensor]) -> list[Chunk]:
        """What of a row is to be brought for its update."""
        if live.on_host:
            return [live.state] if live.state is not None and live.state.tensors else []
        away = any(isinstance(gradients.get(p), AwayGradient) for p in live.trained)
        state = live.state if live.state is not None and live.state.tensors else None
        chunks = [chunk for chunk in (live.weights, live.gradients if away else None, state) if chunk is not None]
        return [chunk for chunk in chunks if chunk is not live.state] if self._sliced(live, chunks, gradients) else chunks

    def _sliced(self, live: LiveRow, chunks: Sequence[Chunk], gradients: dict[nn.Parameter, Tensor]) -> bool:
        """Whether the row is too large to be there as a whole, and can be updated by slices."""
        limit, chunk = self._engine.gauge.limit, live.state
        if limit is None or chunk is None or self._engine.device.type != "cpu" or not can_slice(self.optimizer):
            return False
        plain = all(p.is_contiguous() and gradients[p].is_contiguous() for p in live.trained if p in gradients)
        begun = any(key != RESIDUAL for p in live.trained for key in self.optimizer.state.get(p, ()))
        state = chunk.size if begun else max(chunk.size, int(sum(self._kept_bytes * p.numel() for p in live.trained)))
        return plain and state + sum(other.size for other in chunks if other is not chunk) > limit

    def _row(
        self,
        live: LiveRow,
        follower: LiveRow | None,
        gradients: dict[nn.Parameter, Tensor],
        before: Before | None,
        keep_gradients: bool,
    ) -> None:
        """Update a row; what `follower` will need is fetched meanwhile."""
        chunks = self._chunks(live, gradients)
        sliced = not live.on_host and live.state not in chunks and self._sliced(live, chunks, gradients)
        if _stateless(live) or sliced:  # what the optimizer makes needs room as well
            self._engine.mover.settle()
        own = {p: gradients[p] for p in live.trained if p in gradients}
        later = False
        try:
            for chunk in chunks:
                chunk.begin()
            if follower is not None and not (sliced or _stateless(live) or _stateless(follower)):
                if self._engine.device.type == "cpu":  # both would share the disk, and memory for a third row be taken
                    self._engine.mover.settle()
                self._expect(follower, gradients)
            if live.on_host:
                later = self._on_cores(live, own, before)
            else:
                start = time.perf_counter()
                self._update_sliced(live, own, before) if sliced else self._update(own, before)
                self._engine.recorder.span("update", live.name, start)
        except (RuntimeError, MemoryError):
            _put_back(chunks)
            raise
        for chunk in chunks:
            chunk.end()
        if live.gradients is not None and (live.on_host or live.gradients in chunks):
            if not keep_gradients:
                live.gradients.forget()
            elif not live.on_host:
                live.gradients.store()
        if live.weights is not None and not live.on_host:
            live.weights.store()
        if not later:
            self.keep_state(live)
        for parameter in own:
            del gradients[parameter]
        self._engine.mover.settle(sum(chunk.size for chunk in chunks))

    def _on_cores(self, live: LiveRow, gradients: dict[nn.Parameter, Tensor], before: Before | None) -> bool:
        """Update a row on host cores; whether that still goes on."""
        if self._overlap and self._host.update_later(live, gradients, before):
            return True
        self._host.update(live, gradients, before)
        return False

    def _update_sliced(self, live: LiveRow, gradients: dict[nn.Parameter, Tensor], before: Before | None) -> None:
        assert live.state is not None, "only what is away is updated by slices"
        if live.state.state is not State.FREE:
            live.state.drop()
            self._engine.mover.settle()
        values = {p: g.held if isinstance(g, AwayGradient) else g for p, g in gradients.items()}
        self._torn = True
        Slices(self.optimizer, self._engine.gauge).update(live.state, values, before, scaled=self._scaled)
        self._torn = False

    def keep_state(self, live: LiveRow) -> None:
        """Send what the optimizer keeps of a row to where it lives."""
        if live.on_host:
            self._host.keep(live)
        chunk = live.state
        if chunk is None:
            return
        tensors = []
        for parameter in live.trained:
            state = self.optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.numel() > 1 and value.untyped_storage().nbytes():
                    state[key] = own_storage(value)
                    tensors.append(state[key])
        if tensors and not (chunk.state is State.FREE and chunk.tensors):
            chunk.adopt(tensors)
            chunk.store()

    def state_dict(self) -> dict[str, Any]:
        """As the optimizer's own, with copies of what is away: whole in memory."""
        self._engine.finish_updates()
        copied = self.optimizer.state_dict()
        numbers = {id(p): number for number, p in enumerate(self._parameters)}
        for live in self._engine.moving:
            with self.gathered(live):
                for parameter in live.trained:
                    state = copied["state"].get(numbers.get(id(parameter)), {})
                    copied["state"] |= {numbers[id(parameter)]: {k: copy.deepcopy(v) for k, v in state.items()}} if state else {}
        return copied

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._engine.finish_updates()
        for live in self._engine.moving:
            if live.state is not None:
                live.state.forget()
        self.optimizer.load_state_dict(state_dict)
        for live in self._engine.moving:
            self.keep_state(live)
            self._engine.mover.settle()

    @contextlib.contextmanager
    def gathered(self, live: LiveRow) -> Iterator[None]:
        """What the optimizer keeps of a row is on the device in this context; changes to it are lost."""
        chunk = live.state if live.state is not None and live.state.tensors and not live.state.here else None
        if chunk is not None:
            chunk.hold()
        try:
            yield
        finally:
            if chunk is not None:
                chunk.drop()
