"""Copies between an accelerator and its lower tiers, on streams of their own.

What the engine takes of memory when it places a model on an accelerator, for the forecast (`Sizes` and `Table` of
`sartor.plan.table`; "row" is a row of the table):

Device, beside activations and temporaries of the step:
- what the table keeps there, and parameters that are in no row, with gradients and state. All of it, and all that follows, comes
  from PyTorch's caching allocator, tensor by tensor, in the order of the compute stream.
- weights that live elsewhere: two rows at most, the one that computes and the next one. The memory of a row is free for others as
  soon as its last operator was given to the compute stream; who takes it waits on the device until that operator is done.
- gradients that live elsewhere: those of the row in its backward pass and those that are leaving; where micro-batches are
  accumulated, those of the next row as well (`Table.pass_bytes`: two rows of weights, three of gradients).
- A row whose state is not on the device is updated on host cores. Its gradients go to main memory (to disk where the table says
  so) even where the table says `device`, and its update takes nothing of the device.
- A row whose state stays, and whose weights or gradients do not, is updated on the device: they are brought for it, this row's
  and the next one's, beside those of the last one that leave (`Table.update_bytes`).
- activations that live elsewhere: up to ACTIVATIONS_IN_FLIGHT bytes on their way out, and in the backward pass those of the row
  that computes and of the next one.
- Nothing is staged on the device.

Host:
- what the table puts there: weights, gradients and activations page-locked (`sartor.placement.pinned`), each tensor rounded up to
  whole pages of 4 KiB; state in ordinary memory.
- weights that stay on the device of rows that are updated on host cores: a page-locked copy of the trained ones.
- rows with something on disk: while a row is updated, what it has on disk, and what the last one is writing.
- disk: 2 x WORKERS threads with two buffers of SPAN bytes each, and as many with one (`DEVICE_BUFFER_BYTES`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sartor.placement.pinned import PinnedTier
from sartor.placement.tiers import Copy, HostTier, Mover, Region, Tier
from sartor.plan.table import ACTIVATIONS_IN_FLIGHT, SPAN

Way = Literal["in", "out"]


class Event(Protocol):
    """A point on a stream."""

    def query(self) -> bool:
        """Whether the device has passed it."""
        ...

    def synchronize(self) -> None:
        """The host waits for it."""
        ...


class Streams(Protocol):
    """The order of things on a device: a stream that computes, one for what comes in, one for what goes out."""

    def mark(self) -> Event:
        """Where the compute stream is: after everything that was given to it so far."""
        ...

    def copy(self, way: Way, target: Tensor, source: Tensor, after: Event) -> Event:
        """A copy of bytes that begins after `after`; the event is its end."""
        ...

    def wait(self, event: Event) -> None:
        """What is given to the compute stream from now on begins after `event`."""
        ...

    def drain(self) -> None:
        """The host waits until all copies are done."""
        ...


class AcceleratorStreams:
    """Of a CUDA device, or another one that `torch.accelerator` knows."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sides = {way: torch.Stream(device) for way in ("in", "out")}
        self._lock = threading.Lock()  # a stream that is entered remembers in itself, for all threads, what was current before

    def mark(self) -> Any:
        return torch.accelerator.current_stream(self._device).record_event()

    def copy(self, way: Way, target: Tensor, source: Tensor, after: Any) -> Any:
        side = self._sides[way]
        with self._lock:
            side.wait_event(after)
            with side:
                target.copy_(source, non_blocking=True)
            return side.record_event()

    def wait(self, event: Any) -> None:
        torch.accelerator.current_stream(self._device).wait_event(event)

    def drain(self) -> None:
        for side in self._sides.values():
            side.synchronize()


class StreamCopy:
    """A copy on a stream, like one that a thread makes (a `Future`): to ask for its result orders the compute stream after it and
    does not stop the host."""

    def __init__(self, streams: Streams, event: Event) -> None:
        self._streams, self._event = streams, event

    def done(self) -> bool:
        return self._event.query()

    def result(self) -> None:
        self._streams.wait(self._event)

    def exception(self) -> None:
        self.result()


class StreamMover(Mover):
    """Copies between a device and its lower tiers. Main memory is copied from and to by streams; what lives on disk goes through
    page-locked buffers of the threads that read and write the file."""

    in_flight_bytes = ACTIVATIONS_IN_FLIGHT

    def __init__(self, streams: Streams, staging: HostTier, *, note: Callable[[str, str, float], None] = lambda *_: None) -> None:
        """`staging`: where buffers come from."""
        super().__init__(note=note)
        self._streams, self._staging = streams, staging
        self._buffers = threading.local()
        self.host = Mover(note=note)
        """Between disk and main memory, for what is updated on host cores."""

    def read(self, tier: Tier, region: Region, storage: torch.UntypedStorage) -> Sequence[Copy]:
        self.read_bytes += region.size
        target, ready = _bytes_of(storage), self._streams.mark()
        if isinstance(tier, HostTier):
            return [StreamCopy(self._streams, self._streams.copy("in", target, tier.view(region), ready))]

        def come(start: int, size: int) -> None:
            buffer = self._buffer()[:size]
            tier.read(region, start, size, buffer.data_ptr())
            self._streams.copy("in", target[start : start + size], buffer, ready).synchronize()

        return self._spread("fetch", self._readers, come, region.size)

    def write(self, tier: Tier, region: Region, storage: torch.UntypedStorage) -> Sequence[Copy]:
        self.written_bytes += region.size
        source, made = _bytes_of(storage), self._streams.mark()
        if isinstance(tier, HostTier):
            return [StreamCopy(self._streams, self._streams.copy("out", tier.view(region), source, made))]

        def go(start: int, size: int) -> None:
            buffer = self._buffer()[:size]
            self._streams.copy("out", buffer, source[start : start + size], made).synchronize()
            tier.write(region, start, size, buffer.data_ptr())

        return self._spread("write back", self._writers, go, region.size)

    def _buffer(self) -> Tensor:
        """Page-locked, of the calling thread."""
        if not hasattr(self._buffers, "tensor"):
            self._buffers.tensor = self._staging.view(self._staging.allocate(SPAN))
        return self._buffers.tensor  # type: ignore[no-any-return]

    def settle(self, most: int = 0) -> None:
        super().settle(most)
        self.host.settle(most)

    def push(self, target: Tensor, source: Tensor) -> None:
        """The bytes of `source`, on the host, are those of `target` for what is given to the device from now on."""
        there, here = _bytes_of(target.untyped_storage()), _bytes_of(source.untyped_storage())
        self._streams.wait(self._streams.copy("in", there, here[: there.nbytes], self._streams.mark()))

    def drain(self) -> None:
        """Everything has left when this returns, and the host may read it."""
        self.settle()
        self._streams.drain()

    def close(self) -> None:
        super().close()
        self.host.close()
        self._streams.drain()


def where(model: nn.Module) -> torch.device:
    """The device that a model computes on; a CPU for one without memory."""
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))


def numbered(device: torch.device) -> torch.device:
    """With the index that tensors on it have."""
    if device.type == "cpu" or ":" in str(device):
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def mover_of(
    device: torch.device, tiers: dict[str, Tier], streams: Streams | None, *, note: Callable[[str, str, float], None]
) -> Mover:
    """What copies between a device and `tiers`. An accelerator needs page-locked memory, which is added where it is not there."""
    if streams is None and device.type == "cpu":
        return Mover(note=note)
    host = tiers.setdefault("host", PinnedTier(device))
    assert isinstance(host, HostTier), "what is on the host is a HostTier"
    return StreamMover(streams or AcceleratorStreams(device), host, note=note)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    made: Tensor = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return made
