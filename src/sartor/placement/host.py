"""Updates on host cores, of rows whose optimizer state is not on the accelerator that computes.

The optimizer that was given keeps its parameters, which are on the device. A second one like it takes its steps: its parameters
are twins of theirs in main memory, and what it keeps is what the first one keeps. Where weights and gradients live in main
memory, the twins are the very bytes that are fetched to the device; what lives on disk is read for the update, and written again.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from sartor.placement.chunk import Chunk, State, empty_like, own_storage
from sartor.placement.engine import Engine
from sartor.placement.gradients import AwayGradient
from sartor.placement.live import LiveRow
from sartor.placement.streams import StreamMover
from sartor.placement.tiers import HostTier, Region

Before = Callable[[Sequence[Tensor], torch.optim.Optimizer], None]
"""Called with the gradients of a part of the update, and the optimizer that will take it."""


class HostOptimizer:
    """Takes an optimizer's steps for rows that are updated on host cores."""

    def __init__(self, engine: Engine, optimizer: torch.optim.Optimizer) -> None:
        self._engine, self._given, self._own = engine, optimizer, like(optimizer)
        self._twins: dict[nn.Parameter, nn.Parameter] = {}
        self._copies: dict[nn.Parameter, tuple[Region, int]] = {}
        """Of weights that stay on the device: their place in main memory, and their version when both were the same."""
        self._cores = ThreadPoolExecutor(1, "sartor-update")
        self._made: set[str] = set()
        """Rows of which the optimizer keeps something."""
        self.failed = False
        """Whether an update broke off: the weights are of no use."""

    def adopt(self, rows: Sequence[LiveRow]) -> None:
        """These rows are updated here from now on. What the optimizer keeps of them comes to main memory."""
        staying = {parameter for live in rows if live.weights is None for parameter in live.trained}
        for parameter in [parameter for parameter in self._copies if parameter not in staying]:
            self._host.free(self._copies.pop(parameter)[0])
        for live in rows:
            self.keep(live)
            for parameter in live.trained:
                self._twins[parameter] = self._twin(live, parameter)
        self._own.param_groups = [
            {**group, "params": [self._twins[p] for p in group["params"] if p in self._twins]}
            for group in self._given.param_groups
        ]
        for name, known in vars(self._given).items():  # what an optimizer knows of parameters, it knows of their twins
            if name != "state" and isinstance(known, dict) and any(parameter in known for parameter in self._twins):
                vars(self._own)[name] = {self._twins.get(key, key): value for key, value in known.items()}

    def keep(self, live: LiveRow) -> None:
        """What the optimizer keeps of a row is in main memory when this returns."""
        for parameter in live.trained:
            state = self._given.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and not value.is_cpu:
                    state[key] = value.cpu()

    def release(self, rows: Sequence[LiveRow]) -> None:
        """What the optimizer keeps of these rows is where it would have made it."""
        of_rows = {parameter for live in rows for parameter in live.trained}
        for group in self._given.param_groups:
            counters_too = group.get("fused") or group.get("capturable")
            for parameter in group["params"]:
                state = self._given.state.get(parameter, {}) if parameter in of_rows else {}
                for key, value in state.items():
                    if isinstance(value, Tensor) and (value.numel() > 1 or counters_too):
                        state[key] = value.to(parameter.device)

    def begin(self, rows: Sequence[LiveRow]) -> None:
        """Before a step that updates these rows: their gradients have arrived, their weights are not on the device, and what the
        optimizer goes by is known here."""
        self._engine.finish_updates()
        for live in rows:
            if live.weights is not None and live.weights.state in (State.HOLD, State.COMING):
                live.weights.drop()
        if rows:
            self._mover.drain()
        for mine, given in zip(self._own.param_groups, self._given.param_groups, strict=True):
            mine |= {key: value for key, value in given.items() if key != "params"}

    def update(self, live: LiveRow, gradients: dict[nn.Parameter, Tensor], before: Before | None) -> None:
        """Of the row's parameters that have gradients."""
        with self._weights(live, list(gradients)), self._gradients(live, gradients) as values:
            self._take(live, values, before)
        self._made.add(live.name)

    def update_later(self, live: LiveRow, gradients: dict[nn.Parameter, Tensor], before: Before | None) -> bool:
        """The same while the next step's forward pass computes, row after row in the order in which that needs them. False where
        that cannot be: for what is on disk, and where the optimizer will make its state, for which there may be no memory."""
        homes = [chunk for chunk in (live.weights, live.gradients) if chunk is not None]
        away = all(isinstance(gradient, AwayGradient) for gradient in gradients.values())
        if live.name not in self._made or live.state is not None or not away:
            return False
        if not all(isinstance(chunk.tier, HostTier) for chunk in homes):
            return False
        weights = self._weights(live, list(gradients))
        weights.__enter__()
        with self._gradients(live, gradients) as values:
            update = self._cores.submit(self._take, live, values, before)
        for chunk in homes:
            chunk.gate = update

        def finish() -> None:
            live.finish_update = lambda: None
            update.result()
            weights.__exit__(None, None, None)

        live.finish_update = finish
        return True

    def _take(self, live: LiveRow, values: dict[nn.Parameter, Tensor], before: Before | None) -> None:
        """The update, on gradients in main memory."""
        start = time.perf_counter()
        try:
            for parameter, value in values.items():
                twin = self._twins[parameter]
                twin.grad_dtype = value.dtype
                twin.grad = value
                self._own.state[twin] = self._given.state[parameter]
            if before is not None:
                before(list(values.values()), self._own)
            self._own.step()
            for parameter in values:
                twin = self._twins[parameter]
                twin.grad = None
                self._given.state[parameter] = self._own.state.pop(twin)
        except BaseException:
            self.failed = True
            raise
        self._engine.recorder.span("update", live.name, start)

    # -- twins

    def _twin(self, live: LiveRow, parameter: nn.Parameter) -> nn.Parameter:
        chunk = live.weights
        if chunk is None:
            values = self._copy_of(parameter)
        elif isinstance(chunk.tier, HostTier):
            values = next(_view(chunk.tier, region, parameter) for tensor, region in chunk.homes() if tensor is parameter)
        else:
            values = empty_like(parameter, torch.device("cpu"))
        return nn.Parameter(values, requires_grad=True)

    def _copy_of(self, parameter: nn.Parameter) -> Tensor:
        """A place in main memory for weights that stay on the device."""
        if parameter in self._copies:
            region, _ = self._copies[parameter]
        else:
            parameter.data = own_storage(parameter.data)
            region = self._host.allocate(parameter.untyped_storage().nbytes())
        self._copies[parameter] = region, -1
        return _view(self._host, region, parameter)

    @contextlib.contextmanager
    def _weights(self, live: LiveRow, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """The twins have the weights' values in this context, and the weights have theirs after it."""
        chunk = live.weights
        if chunk is None:
            for parameter in parameters:
                if self._copies[parameter][1] != parameter._version:  # somebody else wrote to it
                    self._twins[parameter].data.copy_(parameter.data)
            yield
            for parameter in parameters:
                self._mover.push(parameter.data, self._twins[parameter].data)
                self._copies[parameter] = self._copies[parameter][0], parameter._version
        elif isinstance(chunk.tier, HostTier):
            yield
        else:
            wanted = {parameter: self._twins[parameter] for parameter in parameters}
            moved = self._brought(chunk, [(wanted[p], region) for p, region in chunk.homes() if p in wanted])  # type: ignore[index]
            yield
            moved.end()
            moved.store()
            self._mover.host.settle()

    @contextlib.contextmanager
    def _gradients(self, live: LiveRow, gradients: dict[nn.Parameter, Tensor]) -> Iterator[dict[nn.Parameter, Tensor]]:
        """The gradients' values in main memory."""
        chunk = live.gradients
        homes = {} if chunk is None else {id(tensor): region for tensor, region in chunk.homes()}
        found, read = {}, []
        for parameter, gradient in gradients.items():
            if not isinstance(gradient, AwayGradient):
                found[parameter] = gradient.cpu()
                continue
            assert chunk is not None, "a gradient that is away has a home"
            region = homes[id(gradient.held)]
            if isinstance(chunk.tier, HostTier):
                found[parameter] = _view(chunk.tier, region, gradient.held)
            else:
                found[parameter] = empty_like(gradient.held, torch.device("cpu"))
                read.append((found[parameter], region))
        moved = None if chunk is None or not read else self._brought(chunk, read)
        yield found
        if moved is not None:
            moved.end()
            moved.drop()

    def _brought(self, chunk: Chunk, homes: Sequence[tuple[Tensor, Region]]) -> Chunk:
        moved = chunk.twin(homes, self._mover.host, self._engine.homes.host_gauge)
        moved.begin()
        return moved

    @property
    def _host(self) -> HostTier:
        tier = self._engine.tiers["host"]
        assert isinstance(tier, HostTier), "what is on the host is a HostTier"
        return tier

    @property
    def _mover(self) -> StreamMover:
        assert isinstance(self._engine.mover, StreamMover), "only then a row is updated apart from the device"
        return self._engine.mover


def like(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer of the same kind and settings without parameters."""
    made: Any = object.__new__(type(optimizer))
    vars(made).update(vars(optimizer))
    vars(made).pop("step", None)  # a scheduler's, which would take the step of the first one
    made.state, made.param_groups = defaultdict(dict), []
    return made  # type: ignore[no-any-return]


def _view(tier: HostTier, region: Region, like: Tensor) -> Tensor:
    """The bytes of a region as a tensor like another one, whose storage they are the whole of."""
    storage = tier.view(region).untyped_storage()
    made: Tensor = torch.empty(0, dtype=like.dtype).set_(storage, 0, like.shape, like.stride())
    return made
