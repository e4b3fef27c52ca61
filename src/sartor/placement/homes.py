"""Where the parts of a row live, and how they get there for the first time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import nn

from sartor.kernels.adam import RESIDUAL
from sartor.placement.chunk import Chunk, Gauge, own_storage
from sartor.placement.fill import Fill
from sartor.placement.live import LiveRow
from sartor.placement.streams import StreamMover
from sartor.placement.tiers import Mover, Tier
from sartor.plan.table import RowPlaces, Table


class Memory(Protocol):
    """What chunks are made with: of an engine."""

    tiers: dict[str, Tier]
    mover: Mover
    gauge: Gauge
    device: torch.device

    def looked(self, chunks: Sequence[Chunk]) -> None: ...


class Homes:
    """Makes the chunks of rows as a table says."""

    def __init__(self, memory: Memory, fill: Fill | None) -> None:
        self._memory, self._fill = memory, fill
        self._apart = isinstance(memory.mover, StreamMover)
        self.host_gauge = Gauge()
        """Of what comes from disk to main memory for an update on host cores."""
        self.owner: dict[int, LiveRow] = {}
        """Rows by the storages of their weights, where those are elsewhere."""

    def places(self, table: Table, name: str) -> RowPlaces:
        """Of a row. Where the state is not on the accelerator, the row is updated on host cores, and its gradients go there."""
        places = table.row(name)
        if self._apart and places.state != "device" and places.gradients == "device":
            return dataclasses.replace(places, gradients="host")
        return places

    def settle_in(self, live: LiveRow) -> None:
        """Its parts where they live, from now on."""
        self.make_chunks(live)
        if self._fill is not None:
            self._fill(live.row.parameters)
        self._to_device(live.row.parameters.values(), residuals=not live.on_host)
        residuals = [vars(parameter)[RESIDUAL] for parameter in live.trained if RESIDUAL in vars(parameter)]
        if residuals and live.state is not None:
            live.state.adopt(residuals)
            live.state.store()
            self._memory.mover.settle(live.state.size)
        self.send_weights(live)

    def fill_rest(self, model: nn.Module, rows: Sequence[LiveRow]) -> None:
        """What is in no row stays on the device."""
        placed = {id(parameter) for live in rows for parameter in live.row.parameters.values()}
        rest = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in placed}
        if self._fill is not None:
            self._fill(rest)
        self._to_device([*rest.values(), *model.buffers()])

    def _to_device(self, tensors: Iterable[torch.Tensor], *, residuals: bool = True) -> None:
        """Values that were made or read in main memory; `residuals`: what a master lacks to its weight, too."""
        device = self._memory.device
        for tensor in tensors:
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
            if residuals and RESIDUAL in vars(tensor):
                setattr(tensor, RESIDUAL, vars(tensor)[RESIDUAL].to(device))

    def make_chunks(self, live: LiveRow) -> None:
        """Those of gradients and state, where there are none so far."""
        live.on_host = self._apart and live.places.state != "device" and bool(live.trained)
        if live.gradients is None and live.places.gradients != "device":
            live.gradients = self._chunk(live, "gradients", None)
        if live.state is None and live.places.state != "device" and not (self._apart and live.places.state == "host"):
            live.state = self._chunk(live, "state", self._memory.looked)

    def _chunk(self, live: LiveRow, kind: str, looked: Callable[[Sequence[Chunk]], None] | None) -> Chunk:
        memory, tier = self._memory, self._memory.tiers[getattr(live.places, kind)]
        if kind == "state" and isinstance(memory.mover, StreamMover):
            return Chunk(f"{live.name} {kind}", tier, memory.mover.host, self.host_gauge, looked)
        return Chunk(f"{live.name} {kind}", tier, memory.mover, memory.gauge, looked)

    def send_weights(self, live: LiveRow) -> None:
        """For the first time, where they live elsewhere."""
        if live.weights is not None or live.places.weights == "device":
            return
        live.weights = self._chunk(live, "weights", self._memory.looked)
        for parameter in live.row.parameters.values():
            parameter.data = own_storage(parameter.data)
            self.owner[parameter.untyped_storage()._cdata] = live
        live.weights.adopt(list(live.row.parameters.values()))
        live.weights.store()
        self._memory.mover.settle(live.weights.size)
