"""The engine: brings the weights of a row before they are used, and lets them go afterwards.

Hooks on the modules of a row say when it is used in a forward pass; the gradient of its output says when in a backward pass. A
row's backward pass is over when that of another row begins, or the whole pass ends: autograd runs the latest operators first. The
row that followed last time is fetched while this one computes. The first forward pass runs under `Watch`: what touches weights
outside of their row's use is brought as it is needed, and stays from then on.
"""

from __future__ import annotations

import contextlib
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
from sartor.placement.live import LiveRow, Watch
from sartor.placement.tiers import Mover, Tier
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
        watch: bool = False,
    ) -> None:
        """Moves what the table places elsewhere to its tier, row after row. `fill`: for a model on the meta device, gives the
        parameters of a row their values. `limit`: bytes of what moves that may be on the device at once; `update_limit`: in an
        update, if that differs. `watch`: keep a timeline."""
        self.model, self.table, self.tiers, self._fill = model, table, dict(tiers), fill
        self._limits = limit, limit if update_limit is None else update_limit
        self.visits = Visits()
        self.mover, self.gauge = Mover(), Gauge(watch=watch, limit=limit)
        self.rows = [LiveRow(row, table.row(row.name)) for row in rows]
        self.activations = Activations(self.mover, self.tiers)
        self.measure: Callable[[Tensor], Any] | None = None
        """Applied to every gradient that leaves, and kept with it: its norm, in the last micro-batch of a step."""
        self._owner: dict[int, LiveRow] = {}
        self._backward: LiveRow | None = None
        self._in_backward = False
        self._warm = False
        self._watch: Watch | None = None
        self._last: tuple[str, LiveRow] | None = None
        self._next: dict[tuple[str, LiveRow], tuple[str, LiveRow]] = {}
        self._handles: list[Any] = []
        if self.moving:
            give_back_large_blocks()
        for live in self.rows:
            self._settle_in(live)
        if fill is not None:
            fill({name: parameter for name, parameter in model.named_parameters() if parameter.is_meta})
        self.mover.settle()
        give_back_freed_memory()
        self._attach()

    # -- where things live

    def chunk(self, live: LiveRow, kind: str) -> Chunk | None:
        """A new chunk of a row; None where its table keeps the kind on the device."""
        place = getattr(live.places, kind)
        return None if place == "device" else Chunk(f"{live.name} {kind}", self.tiers[place], self.mover, self.gauge)

    def _settle_in(self, live: LiveRow) -> None:
        live.weights, live.gradients, live.state = (self.chunk(live, kind) for kind in ("weights", "gradients", "state"))
        if self._fill is not None:
            self._fill(live.row.parameters)
        residuals = [vars(parameter)[RESIDUAL] for parameter in live.trained if RESIDUAL in vars(parameter)]
        if residuals and live.state is not None:
            live.state.adopt(residuals)
            live.state.store()
            self.mover.settle(live.state.size)
        if live.weights is None:
            return
        for parameter in live.row.parameters.values():
            parameter.data = own_storage(parameter.data)
            self._owner[parameter.untyped_storage()._cdata] = live
        live.weights.adopt(list(live.row.parameters.values()))
        live.weights.store()
        self.mover.settle(live.weights.size)

    @property
    def moving(self) -> list[LiveRow]:
        """Rows of which something moves."""
        return [live for live in self.rows if not live.places.stays]

    # -- hooks

    def _attach(self) -> None:
        def hook(handle: Any) -> None:
            self._handles.append(handle)

        self.follow(self.model)
        for live in self.moving:
            for module in live.row.modules:
                hook(module.register_forward_pre_hook(lambda *_, live=live: self._before_forward(live), prepend=True))
                hook(
                    module.register_forward_hook(
                        lambda module, _, output, live=live: self._after_forward(live, module, output), prepend=True
                    )
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
        for live in self.rows:
            if live.weights is not None:
                live.weights.hold()
            if live.gradients is not None:
                for parameter in live.trained:
                    if isinstance(parameter.grad, AwayGradient):
                        parameter.grad = None
            if live.state is not None and live.state.tensors:
                live.state.hold()
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
        self.activations.enter(self)
        if not self._warm and self._watch is None:
            self._watch = Watch(self.touched)
            self._watch.__enter__()  # type: ignore[no-untyped-call]

    def _after_model(self) -> None:
        if self._in_backward:
            return
        self.activations.leave()
        watch, self._watch, self._warm = self._watch, None, True
        if watch is not None:
            watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]

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
        self._follow(FORWARD, live)

    def _after_forward(self, live: LiveRow, module: nn.Module, output: Any) -> None:
        if self._in_backward:
            return
        live.uses = max(live.uses - 1, 0)
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
                self.send_gradients(other)
        self._finish_backward()
        self._backward = live
        self.tidy((live,))
        if live.weights is not None and phase == BACKWARD:
            live.weights.begin()
        self.bring_gradients(live)
        self._follow(phase, live)

    def bring_gradients(self, live: LiveRow) -> None:
        """Gradients of earlier micro-batches, to be added to."""
        if live.gradients is None:
            return
        away = [parameter for parameter in live.trained if isinstance(parameter.grad, AwayGradient)]
        if away:
            live.gradients.hold()
        else:
            live.expected = sum(p.numel() * (p.grad_dtype or p.dtype).itemsize for p in live.trained)
            live.gradients.make_room(live.expected)
            self.gauge.add(live.expected)
        for parameter in away:
            parameter.grad = parameter.grad.held  # type: ignore[union-attr]

    def _finish_backward(self) -> None:
        live, self._backward = self._backward, None
        if live is None:
            return
        if live.weights is not None and live.weights.state is State.COMPUTE:
            live.weights.end()
        self.send_gradients(live)
        self._let_go(live)

    def send_gradients(self, live: LiveRow) -> None:
        """Write the gradients that are on the device to where they live."""
        chunk = live.gradients
        self.gauge.add(-live.expected)
        live.expected = 0
        real = {p: p.grad for p in live.trained if p.grad is not None and not isinstance(p.grad, AwayGradient)}
        if chunk is None or not real:
            return
        for parameter in live.trained:
            if isinstance(parameter.grad, AwayGradient):  # some came late: all leave together
                chunk.hold()
                real[parameter] = parameter.grad.held
        gradients = {p: own_storage(real[p]) for p in live.trained if p in real}
        norms = [None if self.measure is None else self.measure(gradient) for gradient in gradients.values()]
        chunk.adopt(list(gradients.values()))
        for (parameter, gradient), norm in zip(gradients.items(), norms, strict=True):
            parameter.grad = AwayGradient(chunk, self.visits, gradient, norm)
        del real, gradients
        chunk.store()
        self.mover.settle(chunk.size)

    def _end_backward(self) -> None:
        self._finish_backward()
        self._in_backward = False
        for live in self.rows:  # gradients that came when their row's pass was taken to be over
            self.send_gradients(live)

    def reset(self) -> None:
        """Nothing is under way any more: after a step that failed. Gradients are let go."""
        self._in_backward, self._backward = False, None
        self.visits.leave()
        self.activations.leave()
        self.end_forward()
        for live in self.rows:
            self.gauge.add(-live.expected)
            live.expected = 0
            if live.gradients is not None:
                for parameter in live.trained:
                    parameter.grad = None
                live.gradients.forget()
            if live.weights is not None and live.weights.state is State.COMPUTE:
                live.weights.end()

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
            if live.gradients is not None and live.gradients.state is State.COMING:
                live.gradients.drop()

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

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """The weights of the model's head are on the device in this context, whoever calls it."""
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None  # type: ignore[operator]
        live = next((live for live in self.rows if head in live.row.modules), None)
        if live is None:
            yield
            return
        live.pinned, before = True, live.pinned
        with self.gathered(live):
            yield
            live.pinned = before
