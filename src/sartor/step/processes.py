"""Several processes that compute one step: each a part of its examples, all the same update. PyTorch's gloo sends.

Gradients are sums over examples, so the sum over processes is the gradient of the step. It is taken as gradients become ready in
the last backward pass, in an order that is the same everywhere: backwards through the parameters. Small ones go together, last.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

SMALL_BYTES = 2**18
"""Gradients below this are sent as one message: each message takes a tenth of a millisecond or more."""
MOST_COPIED = 4
"""Gradients on their way that are copies, in float32 or of some rows."""


class World:
    """The processes of a run, and which of them this is. One alone by default: then nothing is sent."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's folder."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Numbers added up over the processes; the same everywhere."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return list(total.tolist())

    def reached(self) -> Any:
        """This process is here; whoever waits for what this returns goes on when all are."""
        return dist.all_reduce(torch.zeros(1), async_op=True)

    def seed(self, seed: int, step: int) -> None:
        """Randomness of a step (dropout): other numbers in every process, the same after a resumption. One process alone goes on
        with the numbers it has."""
        if self.size > 1:
            torch.manual_seed(int(np.random.SeedSequence([seed, step, self.rank]).generate_state(1)[0]))

    def gather(self, value: Any) -> list[Any]:
        """Of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def lead(self, value: Any = None) -> Any:
        """The first process's value, which all others wait for."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def when_ready(parameter: nn.Parameter, method: Callable[[Tensor], None]) -> None:
    """Call a method whenever a gradient was added up, for as long as its object lives. (Python's collector cannot see that a
    parameter holds its hooks: one that held the object, which holds parameters, would keep both for good.)"""
    known = weakref.WeakMethod(method)

    def call(ready: Tensor) -> None:
        if (own := known()) is not None:
            own(ready)

    parameter.register_post_accumulate_grad_hook(call)


def lookup_table(model: nn.Module) -> nn.Parameter | None:
    """The trained weight that input tokens are looked up in, where nothing else is computed with it."""
    layer = model.get_input_embeddings()  # type: ignore[operator]
    if type(layer) is not nn.Embedding or not layer.weight.requires_grad:
        return None
    owners = sum(weight is layer.weight for module in model.modules() for weight in module._parameters.values())
    return cast(nn.Parameter, layer.weight) if owners == 1 else None


class GradientSum:
    """Adds gradients up over the processes of a world."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World, *, embedding: nn.Parameter | None = None) -> None:
        """`embedding`: one that is looked up by input tokens, and whose other rows should get no gradient. The first step tells
        whether that is so; then those rows alone are sent."""
        self._world, self._parameters = world, list(parameters.values())
        self._embedding, self._rows = embedding, torch.empty(0, dtype=torch.int64)
        self._by_rows: bool | None = None
        self._large = [p for p in reversed(list(parameters.values())) if p.numel() * p.element_size() >= SMALL_BYTES]
        self._small = [p for p in parameters.values() if p.numel() * p.element_size() < SMALL_BYTES]
        self._next = 0
        self._ready: set[Tensor] = set()
        self._sent: list[tuple[Tensor, Tensor, Any]] = []
        self._counting = False
        for parameter in self._large:
            when_ready(parameter, self._note)

    def expect(self, tokens: Tensor) -> None:
        """The step that comes has these tokens, in all processes together."""
        self._rows = tokens

    def begin(self) -> None:
        """The backward pass that comes is this process's last of the step."""
        self._counting = True

    def updated(self) -> list[nn.Parameter]:
        """What this process updates: everything."""
        return [parameter for parameter in self._parameters if parameter.grad is not None]

    def whole_norm(self, norm: Tensor) -> Tensor:
        """The norm of all gradients, from that of what this process updates."""
        return norm

    def publish(self) -> None:
        """All processes have made the same update; there is nothing to hand out."""

    def discard(self) -> None:
        """Gradients are the optimizer's to free."""

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until every gradient is that of the whole step. A parameter that no process has a gradient for has none."""
        absent = [parameter.grad is None for parameter in (*self._large, *self._small)]
        for parameter in (*self._large, *self._small):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype or parameter.dtype)
        own = self._has_other_rows()
        self._send(len(self._large))
        self._sum_small()
        self._wait(0)
        elsewhere, *missing = self._world.sum(own, *map(float, absent))
        self._by_rows = elsewhere == 0 if self._by_rows is None else self._by_rows
        for parameter, count in zip((*self._large, *self._small), missing, strict=True):
            if count == self._world.size:
                parameter.grad = None
        self._next, self._counting = 0, False
        self._ready.clear()

    def _note(self, parameter: Tensor) -> None:
        """A gradient is complete: it goes out with all that may follow now."""
        if not self._counting:
            return
        self._ready.add(parameter)
        end = self._next
        while end < len(self._large) and self._large[end] in self._ready:
            end += 1
        self._send(end)

    @torch.no_grad()
    def _send(self, end: int) -> None:
        for parameter in self._large[self._next : end]:
            gradient = parameter.grad
            assert gradient is not None, "a gradient that is ready"
            message = gradient[self._rows] if self._by_rows and parameter is self._embedding else gradient
            if self._world.size > 2:  # two gradients are rounded once, as one process's own; more roundings would add up
                message = message.float()
            if message is not gradient:
                self._wait(MOST_COPIED - 1)
            self._sent.append((gradient, message, dist.all_reduce(message, async_op=True)))
        self._next = max(self._next, end)

    def _wait(self, left: int) -> None:
        """Until at most so many gradients are on their way."""
        while len(self._sent) > left:
            gradient, message, work = self._sent.pop(0)
            work.wait()
            if message.shape != gradient.shape:
                gradient[self._rows] = message.to(gradient.dtype)
            elif message is not gradient:
                gradient.copy_(message)

    def _has_other_rows(self) -> float:
        """Whether the embedding has a gradient for tokens that the step does not have; asked in the first step only."""
        if self._embedding is None or self._by_rows is not None:
            return 0.0
        gradient = self._embedding.grad
        assert gradient is not None, "every parameter has one by now"
        other = torch.ones(len(gradient), dtype=torch.bool)
        other[self._rows] = False
        return float(bool(gradient[other].count_nonzero()))

    def _sum_small(self) -> None:
        gradients: Sequence[Tensor] = [p.grad for p in self._small if p.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.flatten().float() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(piece.view_as(gradient))
