"""Rows that live: where their chunks are, and how their gradients come and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sartor.model.rows import Row
from sartor.placement.chunk import Chunk, Gauge, Visits, own_storage
from sartor.placement.gradients import AwayGradient
from sartor.placement.tiers import Mover
from sartor.plan.table import RowPlaces


class LiveRow:
    """A row, and where its chunks are. A chunk is None where the kind stays on the device."""

    def __init__(self, row: Row, places: RowPlaces) -> None:
        self.row, self.places = row, places
        self.on_host = False
        """Whether it is updated on host cores, since its state is not on the accelerator that computes."""
        self.finish_update: Callable[[], None] = lambda: None
        """Waits for its update on host cores, and brings weights that stay on the device."""
        self.weights: Chunk | None = None
        self.gradients: Chunk | None = None
        self.state: Chunk | None = None
        self.uses = 0
        self.since = 0.0
        """When it began to compute."""
        self.pinned = False
        """Weights stay: something reads them at times that nobody announces."""
        self.expected = 0
        """Bytes of gradients that its backward pass is making."""

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.row.parameters.values() if parameter.requires_grad]

    @property
    def name(self) -> str:
        return self.row.name


class GradientTraffic:
    """Brings the gradients of rows, and sends them away."""

    def __init__(self, mover: Mover, gauge: Gauge, visits: Visits) -> None:
        self._mover, self._gauge, self._visits = mover, gauge, visits
        self.measure: Callable[[Tensor], Any] | None = None
        """Applied to every gradient that leaves, and kept with it: its norm, in the last micro-batch of a step."""

    def bring(self, live: LiveRow) -> None:
        """Those of earlier micro-batches, to be added to."""
        if live.gradients is None:
            return
        away = [parameter for parameter in live.trained if isinstance(parameter.grad, AwayGradient)]
        if away:
            live.gradients.hold()
        else:
            live.expected = sum(p.numel() * (p.grad_dtype or p.dtype).itemsize for p in live.trained)
            live.gradients.make_room(live.expected)
            self._gauge.add(live.expected)
        for parameter in away:
            parameter.grad = parameter.grad.held  # type: ignore[union-attr]

    def send(self, live: LiveRow) -> None:
        """Write those that are on the device to where they live."""
        chunk = live.gradients
        self._gauge.add(-live.expected)
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
            parameter.grad = AwayGradient(chunk, self._visits, gradient, norm)
        del real, gradients
        chunk.store()
        self._mover.settle(chunk.size)

    def discard(self, live: LiveRow) -> None:
        """Let them go."""
        self._gauge.add(-live.expected)
        live.expected = 0
        if live.gradients is not None:
            for parameter in live.trained:
                parameter.grad = None
            live.gradients.forget()
