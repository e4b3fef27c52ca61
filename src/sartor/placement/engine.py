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

from sartor.kernels.adam import RESIDUAL
from sartor.machine.heap import give_back_freed_memory, give_back_large_blocks
from sartor.model.rows import Row
from sartor.placement.activations import Activations
from sartor.placement.chunk import Chunk, Gauge, State, Visits, own_storage
from sartor.placement.fill import Fill
from sartor.placement.gradients import AwayGradient
from sartor.placement.live import GradientTraffic, LiveRow
from sartor.placement.tiers import Mover, Tier
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
    ) -> None:
        """Moves what the table places elsewhere to its tier, row after row. `fill`: for a model on the meta device, gives the
        parameters of a row their values. `limit`: bytes of what moves that may be on the device at once; `update_limit`: in an
        update, if that differs. `debug`: is told of every coming and going."""
        self.model, self.table, self.tiers, self._fill = model, table, dict(tiers), fill
        self._limits: tuple[int | None, ...] = limit, limit if update_limit is None else update_limit
        self.visits = Visits()
        self.shortages = 0
        """How often memory ran out while something was brought, and less was fetched ahead from then on."""
        self.recorder = Recorder(self.tiers)
        self.mover = Mover(note=self.recorder.span)
        self.gauge = Gauge(limit=limit, relieve=self._relieve, level=self.recorder.level)
        if debug is not None:
            self.gauge.say = lambda change: debug(change.describe())
        self.rows = [LiveRow(row, table.row(row.name)) for row in rows]
        self.activations = Activations(self.mover, self.tiers)
        self.gradients = GradientTraffic(self.mover, self.gauge, self.visits)
        self._owner: dict[int, LiveRow] = {}
        self._backward: LiveRow | None = None
        self._in_forward = self._in_backward = False
        self._last: tuple[str, LiveRow] | None = None
        self._next: dict[tuple[str, LiveRow], tuple[str, LiveRow]] = {}
        self._handles: list[Any] = []
        if self.moving:
            give_back_large_blocks()
        for live in self.rows:
            self._settle_in(live)
        if fill is not None:
            placed = {id(parameter) for live in self.rows for parameter in live.row.parameters.values()}
            fill({name: parameter for name, parameter in model.named_parameters() if id(parameter) not in placed})
        self.mover.settle()
        give_back_freed_memory()
        self._attach()

    # -- where things live

    def _chunk(self, live: LiveRow, kind: str) -> Chunk | None:
        """A new chunk of a row; None where its table keeps the kind on the device."""
        place = getattr(live.places, kind)
        if place == "device":
            return None
        looked = None if kind == "gradients" else self._looked
        return Chunk(f"{live.name} {kind}", self.tiers[place], self.mover, self.gauge, looked)

    def _settle_in(self, live: LiveRow) -> None:
        live.gradients, live.state = self._chunk(live, "gradients"), self._chunk(live, "state")
        if self._fill is not None:
            self._fill(live.row.parameters)
        residuals = [vars(parameter)[RESIDUAL] for parameter in live.trained if RESIDUAL in vars(parameter)]
        if residuals and live.state is not None:
            live.state.adopt(residuals)
            live.state.store()
            self.mover.settle(live.state.size)
        self._send_weights(live)

    def _send_weights(self, live: LiveRow) -> None:
        """For the first time, where they live elsewhere."""
        live.weights = self._chunk(live, "weights")
        if live.weights is None:
            return
        for parameter in live.row.parameters.values():
            parameter.data = own_storage(parameter.data)
            self._owner[parameter.untyped_storage()._cdata] = live
        live.weights.adopt(list(live.row.parameters.values()))
        live.weights.store()
        self.mover.settle(live.weights.size)

    def rearrange(self, table: Table, *, limit: int | None, update_limit: int | None) -> None:
        """From here on, what another table sends elsewhere lives there. Nothing comes back that is away. A step that is under way
        is given up; state moves when the optimizer's keeper is told (`StreamedOptimizer.rearranged`)."""
        self.reset()
        self.table, self._limits = table, (limit, update_limit)
        self.gauge.limit = limit
        self._next.clear()
        for live in self.rows:
            moved, live.places = live.places, table.row(live.name)
            if live.gradients is None:
                live.gradients = self._chunk(live, "gradients")
            if live.state is None:
                live.state = self._chunk(live, "state")
            if live.weights is None:
                self._send_weights(live)
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

    def reset(self) -> None:
        """Nothing is under way any more: after a step that failed. Gradients are let go."""
        self._in_forward, self._in_backward, self._backward = False, False, None
        self.visits.leave()
        self.activations.leave()
        self.end_forward()
        for live in self.rows:
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

    def _looked(self, chunks: Sequence[Chunk]) -> None:
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
        return self._owner.get(tensor.untyped_storage()._cdata)

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
