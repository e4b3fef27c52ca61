"""The engine: brings the weights of a row before they are used, and lets them go afterwards.

Hooks on the modules of a row say when it is used in a forward pass; the gradient of its output says when in a backward pass. A
row's backward pass is over when that of another row begins, or the whole pass ends: autograd runs the latest operators first. The
row that followed last time is fetched while this one computes. Weights that a pass reads outside of their row's use are brought
when they are needed (`sartor.placement.away`), and stay from then on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sartor.machine.heap import give_back_freed_memory, give_back_large_blocks
from sartor.model.rows import Row
from sartor.placement.activations import Activations
from sartor.placement.chunk import Chunk, Gauge, State, Visits
from sartor.placement.fill import Fill
from sartor.placement.gradients import AwayGradient
from sartor.placement.homes import Homes
from sartor.placement.live import GradientTraffic, LiveRow
from sartor.placement.streams import Streams, mover_of, numbered, where
from sartor.placement.tiers import Tier
from sartor.placement.timeline import Recorder
from sartor.plan.table import Table

FORWARD, BACKWARD, LOOKUP = "forward", "backward", "lookup"
"""Uses of a row; `lookup` is the backward pass of embeddings, which does without weights."""


class Engine:
    """The live placement of a model."""

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        table: Table,
        tiers: Mapping[str, Tier],
        *,
        fill: Fill | None = None,
        limit: int | None = None,
        update_limit: int | None = None,
        debug: Callable[[str], None] | None = None,
        device: torch.device | None = None,
        streams: Streams | None = None,
    ) -> None:
        """Moves what the table places elsewhere to its tier, row after row. `fill`: for a model on the meta device, gives the
        parameters of a row their values. `limit`: bytes of what moves that may be on the device at once; `update_limit`: in an
        update, if that differs. `debug`: is told of every coming and going.
        `device`: what computes, by default where the model is. `streams`: its own, by default; on a CPU threads copy."""
        self.model, self.table, self.tiers = model, table, dict(tiers)
        self.device = numbered(device or where(model))
        self._limits: tuple[int | None, ...] = limit, limit if update_limit is None else update_limit
        self.visits = Visits()
        self.shortages = 0
        """How often memory ran out while something was brought, and less was fetched ahead from then on."""
        self.recorder = Recorder(self.tiers)
        self.mover = mover_of(self.device, self.tiers, streams, note=self.recorder.span)
        self.gauge = Gauge(limit=limit, relieve=self._relieve, level=self.recorder.level)
        if debug is not None:
            self.gauge.say = lambda change: debug(change.describe())
        self.homes = Homes(self, fill)
        self.rows = [LiveRow(row, self.homes.places(table, row.name)) for row in rows]
        self.activations = Activations(self.mover, self.tiers)
        self.gradients = GradientTraffic(self.mover, self.gauge, self.visits)
        self._backward: LiveRow | None = None
        self._in_forward = self._in_backward = False
        self._last: tuple[str, LiveRow] | None = None
        self._next: dict[tuple[str, LiveRow], tuple[str, LiveRow]] = {}
        self._handles: list[Any] = []
        if self.moving and self.device.type == "cpu":
            give_back_large_blocks()
        for live in self.rows:
            self.homes.settle_in(live)
        self.homes.fill_rest(model, self.rows)
        self.mover.settle()
        give_back_freed_memory()
        self._attach()

    # -- where things live

    def rearrange(self, table: Table, *, limit: int | None, update_limit: int | None, keep_gradients: bool = False) -> None:
        """From here on, what another table sends elsewhere lives there. Nothing comes back that is away. A step that is under way
        is given up, but for gradients that are to be kept for the rest of its update; state moves when the optimizer's keeper is
        told (`StreamedOptimizer.rearranged`)."""
        self.reset(keep_gradients=keep_gradients)
        self.finish_updates()
        self.table, self._limits = table, (limit, update_limit)
        self.gauge.limit = limit
        self._next.clear()
        for live in self.rows:
            moved, live.places = live.places, self.homes.places(table, live.name)
            self.homes.make_chunks(live)
            self.gradients.send(live)
            self.homes.send_weights(live)
            if moved.stays and not live.places.stays:
                self._hook(live)
        self.mover.settle()
        give_back_freed_memory()

    def _relieve(self) -> None:
        """Memory has run out: what was fetched ahead goes, and what is leaving is waited for. From here on, nothing is fetched
        ahead beyond what is there now."""
        self.shortages += 1
        self.mover.settle()
        busy = [live for live in self.rows if live is self._backward or live.uses]
        self.tidy(busy)
        give_back_freed_memory()
        now = self.gauge.limit = self.gauge.device_bytes
        self._limits = tuple(now if limit is None else min(limit, now) for limit in self._limits)

    @property
    def moving(self) -> list[LiveRow]:
        """Rows of which something moves."""
        return [live for live in self.rows if not live.places.stays]

    # -- hooks

    def _attach(self) -> None:
        self.follow(self.model)
        for live in self.moving:
            self._hook(live)

    def _hook(self, live: LiveRow) -> None:
        """Its modules say when they are called."""
        for module in live.row.modules:
            self._handles += (
                module.register_forward_pre_hook(lambda *_: self._before_forward(live), prepend=True),
                module.register_forward_hook(lambda module, _, output: self._after_forward(live, module, output), prepend=True),
            )

    def follow(self, model: nn.Module) -> None:
        """Calls of this module are forward passes: of the model, or of what wraps it."""
        self._handles.append(model.register_forward_pre_hook(lambda *_: self._begin(), prepend=True))
        self._handles.append(model.register_forward_hook(lambda *_: self._after_model(), always_call=True))

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """In this context weights are updated: no activations are there."""
        self.gauge.limit = self._limits[1]
        give_back_freed_memory()  # what activations left in the heap
        try:
            yield
        finally:
            self.mover.settle(self._limits[0] if self._limits[0] is not None else self.mover.leaving_bytes)
            self.gauge.limit = self._limits[0]

    def on_detach(self, *handles: Any) -> None:
        """Hooks that go when the model is not placed any more."""
        self._handles += handles

    def detach(self) -> None:
        """The model is an ordinary one again, with all weights on the device. Gradients are let go."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.end_forward()
        self.finish_updates()
        self.gauge.limit = None
        self.visits.leave()
        for live in self.rows:
            if live.weights is not None:
                live.weights.leave_for_good()
            if live.gradients is not None:
                for parameter in live.trained:
                    if isinstance(parameter.grad, AwayGradient):
                        parameter.grad = None
            if live.state is not None and live.state.tensors:
                live.state.leave_for_good()
        self.close()

    def close(self) -> None:
        """Let the tiers go. What lives there is lost."""
        self.mover.close()
        for tier in self.tiers.values():
            tier.close()

    def _begin(self) -> None:
        if self._in_backward:
            return
        self.end_forward()
        self.visits.leave()
        self._in_forward = True
        self.activations.enter(self)

    def _after_model(self) -> None:
        if self._in_backward:
            return
        self._in_forward = False
        self.activations.leave()
        self.finish_updates()  # a head's weights may be read without a call of their module

    def end_forward(self) -> None:
        """Rows that a forward pass began and did not end, since it stopped at the head, are not in use any more."""
        for live in self.rows:
            if live.uses:
                live.uses = 0
                self._let_go(live)

    def _before_forward(self, live: LiveRow) -> None:
        if self._in_backward:  # a recomputation, for which the row's weights are there already
            self.need(live)
            return
        live.uses += 1
        self.activations.row = live
        live.finish_update()
        self.tidy((live,))
        if live.weights is not None:
            live.weights.begin()
        live.since = time.perf_counter()
        self._follow(FORWARD, live)

    def _after_forward(self, live: LiveRow, module: nn.Module, output: Any) -> None:
        if self._in_backward:
            return
        live.uses = max(live.uses - 1, 0)
        self.recorder.span("compute", f"{live.name}, forward", live.since)
        if torch.is_grad_enabled():
            outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
            phase = LOOKUP if isinstance(module, nn.Embedding) else BACKWARD
            if outputs:
                torch.autograd.graph.register_multi_grad_hook(outputs, lambda *_: self._before_backward(live, phase), mode="any")
        if not live.uses:
            self.activations.row = None
            self._let_go(live)
            self._await_update(live)

    def _let_go(self, live: LiveRow) -> None:
        """Free the weights, unless the same row is expected next."""
        if live.weights is None:
            return
        if live.weights.state is State.COMPUTE:
            live.weights.end()
        follower = self._next.get(self._last) if self._last else None
        if live.weights.state is State.HOLD and not live.pinned and (follower is None or follower[1] is not live):
            live.weights.drop()

    # -- backward

    def _before_backward(self, live: LiveRow, phase: str) -> None:
        if self._backward is live:
            if live.weights is not None and phase == BACKWARD:
                live.weights.begin()
            return
        if not self._in_backward:
            self._in_backward = True
            self.end_forward()
            self.visits.leave()
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
            for other in self.rows:  # of a head that was computed with the loss
                self.gradients.send(other)
        self._finish_backward()
        self._backward = live
        self.tidy((live,))
        if live.weights is not None and phase == BACKWARD:
            live.weights.begin()
        self.gradients.bring(live)
        live.since = time.perf_counter()
        self._follow(phase, live)

    def _finish_backward(self) -> None:
        live, self._backward = self._backward, None
        if live is None:
            return
        self.recorder.span("compute", f"{live.name}, backward", live.since)
        if live.weights is not None and live.weights.state is State.COMPUTE:
            live.weights.end()
        self.gradients.send(live)
        self._let_go(live)

    def _end_backward(self) -> None:
        self._finish_backward()
        self._in_backward = False
        for live in self.rows:  # gradients that came when their row's pass was taken to be over
            self.gradients.send(live)

    def reset(self, *, keep_gradients: bool = False) -> None:
        """Nothing is under way any more: after a step that failed. Gradients are let go, or kept for the rest of its update."""
        self._in_forward, self._in_backward, self._backward = False, False, None
        self.visits.leave()
        self.activations.leave()
        self.end_forward()
        for live in self.rows:
            if not keep_gradients:
                self.gradients.discard(live)
            if live.weights is not None and live.weights.state is State.COMPUTE:
                live.weights.end()

    def clear(self) -> None:
        """After `reset`: nothing that moves is on the device any more."""
        self.mover.settle()
        self.tidy(())

    # -- prefetch

    def _follow(self, phase: str, live: LiveRow) -> None:
        """Note what follows on what, and fetch what followed on this the last time."""
        now = (phase, live)
        if self._last is not None:
            self._next[self._last] = now
        self._last = now
        for _ in range(2):  # the next one may be the same row, in its backward pass
            now = self._next.get(now, now)
            if now[1] is not live:
                break
        self.tidy((live, now[1]))
        if now[1] is not live:
            self._expect(*now)

    def coming_row(self) -> LiveRow | None:
        """Between rows of a forward pass, the one that computes next; where that is not known yet, the next one in order."""
        if not self._in_forward or self._last is None:
            return None
        if self._last in self._next:
            return self._next[self._last][1]
        place = self.rows.index(self._last[1]) + 1
        return self.rows[place] if place < len(self.rows) else None

    def _await_update(self, live: LiveRow) -> None:
        """All of this row was given to the device. Where the next one was not fetched, since it was being updated on host cores,
        there is time to wait for that."""
        _, follower = self._next.get(self._last, ("", live)) if self._last else ("", live)
        if follower is not live and follower.weights is not None and follower.weights.gate is not None:
            follower.weights.pass_gate()
            follower.weights.fetch(ahead=True)

    def finish_updates(self) -> None:
        """No update on host cores is under way when this returns."""
        for live in self.rows:
            live.finish_update()

    def tidy(self, wanted: Sequence[LiveRow]) -> None:
        """Free what was fetched for a use that did not come."""
        for live in self.rows:
            if live in wanted or live.pinned:
                continue
            if live.weights is not None and live.weights.state in (State.HOLD, State.COMING):
                live.weights.drop()
            for chunk in (live.gradients, live.state):
                if chunk is not None and chunk.state is State.COMING:
                    chunk.drop()

    def _expect(self, phase: str, live: LiveRow) -> None:
        """Begin to bring what a row will need."""
        if live.weights is not None and phase != LOOKUP:
            live.weights.fetch(ahead=True)
        if phase == FORWARD:
            return
        if live.gradients is not None and any(isinstance(parameter.grad, AwayGradient) for parameter in live.trained):
            live.gradients.fetch(ahead=True)
        self.activations.fetch(live)

    # -- use that no hook announces

    def need(self, live: LiveRow) -> None:
        """The weights are on the device when this returns."""
        if live.weights is not None:
            live.weights.hold()

    def looked(self, chunks: Sequence[Chunk]) -> None:
        """Weights or state are read where nothing announced it: brought for a moment, or in a pass, for good."""
        if not (self._in_forward or self._in_backward):
            self.visits.hold(*chunks)
            return
        for live in self.rows:
            if live.weights in chunks:
                live.pinned = True
        for chunk in chunks:
            chunk.hold()

    def touched(self, tensor: Tensor) -> LiveRow | None:
        """The row whose weights this tensor is a view of."""
        return self.homes.owner.get(tensor.untyped_storage()._cdata)

    @contextlib.contextmanager
    def gathered(self, live: LiveRow) -> Iterator[None]:
        """The weights of a row are on the device in this context; changes to them are lost."""
        absent = live.weights is not None and not live.weights.here
        self.need(live)
        try:
            yield
        finally:
            if absent and live.weights is not None:
                live.weights.drop()
