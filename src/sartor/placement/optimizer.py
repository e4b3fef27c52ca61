"""The optimizer step of a placed model: row by row, on tensors that are brought for it.

Any optimizer of `torch.optim` will do whose update of a parameter looks at this parameter alone: it is asked for a step in which
only the row's parameters have gradients, and leaves the others as they are. So the numbers are those of one step for all.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from sartor.placement.chunk import Chunk, State, own_storage
from sartor.placement.engine import Engine
from sartor.placement.gradients import AwayGradient
from sartor.placement.host import Before, HostOptimizer
from sartor.placement.live import LiveRow


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
        self.rearranged()

    def rearranged(self) -> None:
        """Where things live has changed: what the optimizer keeps goes there."""
        placed = {id(p) for live in self._engine.moving for p in live.trained}
        self._staying = [p for p in self._parameters if id(p) not in placed]
        self._host.adopt(self._on_host)
        for live in self._engine.moving:
            self.keep_state(live)
            self._engine.mover.settle()

    @property
    def _on_host(self) -> list[LiveRow]:
        return [live for live in self._engine.moving if live.on_host]

    def release(self) -> None:
        """When the model is not placed any more: what the optimizer keeps is on the device, too."""
        self._host.release(self._on_host)

    def step(self, before: Before | None = None, *, keep_gradients: bool = False) -> None:
        """Update all parameters that have gradients. `before` is called with the gradients of every part of the update.

        `keep_gradients`: for callers that look at them afterwards; else they are let go. Raises RunError of the tiers.
        """
        self._engine.visits.leave()
        with self._engine.updating():
            self._step(before, keep_gradients)

    def _step(self, before: Before | None, keep_gradients: bool) -> None:
        gradients = {p: p.grad for p in self._parameters if p.grad is not None}
        for parameter in gradients:
            parameter.grad = None
        rows = [live for live in self._engine.moving if any(p in gradients for p in live.trained)]
        self._engine.settle_on_host([live for live in rows if live.on_host])
        if rows:
            self._engine.tidy(rows[:1])
            self._expect(rows[0], gradients)
        staying = {p: gradients[p] for p in self._staying if p in gradients}
        if staying:
            self._update(staying, before)
        for live, follower in zip_longest(rows, rows[1:]):
            self._row(live, follower, gradients, before, keep_gradients)
        if keep_gradients:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient

    def _update(self, gradients: dict[nn.Parameter, Tensor], before: Before | None) -> None:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        if before is not None:
            before(list(gradients.values()), self.optimizer)
        self.optimizer.step()
        for parameter in gradients:
            parameter.grad = None

    def _expect(self, live: LiveRow, gradients: dict[nn.Parameter, Tensor]) -> None:
        for chunk in self._chunks(live, gradients):
            chunk.fetch(ahead=True)

    def _chunks(self, live: LiveRow, gradients: dict[nn.Parameter, Tensor]) -> list[Chunk]:
        """What of a row is to be brought for its update."""
        if live.on_host:
            return [live.state] if live.state is not None and live.state.tensors else []
        away = any(isinstance(gradients.get(p), AwayGradient) for p in live.trained)
        state = live.state if live.state is not None and live.state.tensors else None
        return [chunk for chunk in (live.weights, live.gradients if away else None, state) if chunk is not None]

    def _row(
        self,
        live: LiveRow,
        follower: LiveRow | None,
        gradients: dict[nn.Parameter, Tensor],
        before: Before | None,
        keep_gradients: bool,
    ) -> None:
        """Update a row; what `follower` will need is fetched meanwhile."""
        if _stateless(live):  # what the optimizer makes needs room as well
            self._engine.mover.settle()
        chunks = self._chunks(live, gradients)
        for chunk in chunks:
            chunk.begin()
        if follower is not None and not (_stateless(live) or _stateless(follower)):
            self._expect(follower, gradients)
        own = {p: gradients[p] for p in live.trained if p in gradients}
        start = time.perf_counter()
        if live.on_host:
            self._host.update(live, own, before)
        else:
            self._update({p: g.held if isinstance(g, AwayGradient) else g for p, g in own.items()}, before)
        self._engine.recorder.span("update", live.name, start)
        for chunk in chunks:
            chunk.end()
        if live.gradients is not None and (live.on_host or live.gradients in chunks):
            if not keep_gradients:
                live.gradients.forget()
            elif not live.on_host:
                live.gradients.store()
        if live.weights is not None and not live.on_host:
            live.weights.store()
        self.keep_state(live)
        if not keep_gradients:
            for parameter in own:
                del gradients[parameter]
        self._engine.mover.settle(sum(chunk.size for chunk in chunks))

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
        copied = self.optimizer.state_dict()
        numbers = {id(p): number for number, p in enumerate(self._parameters)}
        for live in self._engine.moving:
            with self.gathered(live):
                for parameter in live.trained:
                    state = copied["state"].get(numbers.get(id(parameter)), {})
                    copied["state"] |= {numbers[id(parameter)]: {k: copy.deepcopy(v) for k, v in state.items()}} if state else {}
        return copied

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
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
