"""The time of a step on an accelerator of which something lives in main memory or on disk.

What a row computes is forecast as with everything on the device, and shared out by its weights. What moves takes its bytes over a
link or a disk, on streams beside the computation, as the engine moves it (`sartor.placement.streams`): weights are fetched for
each pass while the row before computes; gradients leave beside the rows that follow. Where the state of a row is not on the
device, the host updates it when the norm of all gradients is known, and the next forward pass goes as far as rows are updated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sartor.machine import Machine, load_calibration
from sartor.plan.table import RowPlaces, Sizes, Table
from sartor.predict.rates import ADAMW_BYTES
from sartor.predict.streams import Task, run_tasks
from sartor.predict.time import TimeForecast

LINK_SHARE = 0.8
"""Of a link's rate after the line's coding, what copies of page-locked memory reach: the rest is headers of packets. About 25 of
31.5 GB/s are seen on PCIe 4.0 x16."""
UNKNOWN_HOST_BYTES_PER_SECOND = 0.8 * 51.2e9
"""Memory bandwidth of a host of which nothing is known: two channels of DDR4-3200, and what streams reach of it."""
UNKNOWN_DISK_BYTES_PER_SECOND = 2e9
"""Of a disk of which nothing is known: an NVMe drive on PCIe 3.0 x4, with room to spare."""
_BORDER = "border"
STEPS = 4
"""Steps that are simulated; the last one is like all that follow."""
MOST_MICRO_BATCHES = 3
"""Of a step that are simulated; each further one takes as long as the last of these did."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What is below a device, and how fast."""

    to_device: float
    """Bytes a second."""
    to_host: float
    updated: float
    """Parameters a second that the host updates."""
    from_disk: float
    to_disk: float
    notes: tuple[str, ...] = ()
    disk_notes: tuple[str, ...] = ()


def surroundings_of(machine: Machine) -> Surroundings | None:
    """Measured where this machine is calibrated, published or assumed elsewhere; None where the link to the host is not known."""
    calibration = None if machine.elsewhere else load_calibration(machine)
    link, host, disk = (calibration.link, calibration.host, calibration.disk) if calibration else (None, None, None)
    published = [known.host_bytes_per_second for known in machine.links if known.index == machine.device.index]
    rate = next((rate for rate in published if rate), machine.rates.host_link_bytes_per_second if machine.rates else None)
    if link is None and rate is None:
        return None
    notes, disk_notes = [], []
    if host is None:
        notes.append(
            f"the host's speed is not known: its optimizer is taken to go through {UNKNOWN_HOST_BYTES_PER_SECOND / 1e9:.0f} GB/s"
        )
    if disk is None:
        disk_notes.append(f"the disk's speed is not known: {UNKNOWN_DISK_BYTES_PER_SECOND / 1e9:.0f} GB/s are assumed")
    return Surroundings(
        to_device=link.to_device_bytes_per_second if link else LINK_SHARE * (rate or 0),
        to_host=link.to_host_bytes_per_second if link else LINK_SHARE * (rate or 0),
        updated=host.adamw_parameters_per_second if host else UNKNOWN_HOST_BYTES_PER_SECOND / ADAMW_BYTES,
        from_disk=disk.read_bytes_per_second if disk else UNKNOWN_DISK_BYTES_PER_SECOND,
        to_disk=disk.write_bytes_per_second if disk else UNKNOWN_DISK_BYTES_PER_SECOND,
        notes=tuple(notes),
        disk_notes=tuple(disk_notes),
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of a step without placement."""

    forward: float
    """Seconds of a micro-batch."""
    backward: float
    optimizer: float
    micro_batches: float

    @classmethod
    def of(cls, time: TimeForecast, *, micro_batches: float, backward: float) -> Work:
        """`backward`: what the backward pass computes, where the forward pass computes 1."""
        optimizer = time.breakdown.get("optimizer", 0.0)
        passes = (time.step_seconds - optimizer) / micro_batches
        forward = passes / (1 + backward)
        return cls(forward=forward, backward=passes - forward, optimizer=optimizer, micro_batches=micro_batches)


def offloaded_seconds(
    work: Work,
    table: Table,
    sizes: Sequence[Sizes],
    around: Surroundings,
    *,
    gradient_width: int,
    ahead: bool = True,
    activations: Sequence[int] = (),
) -> float:
    """Of a step, once steps are alike. `gradient_width`: bytes of a gradient's element. `activations`: bytes of each row's that
    leave in a forward pass."""
    rows = _rows(work, table, sizes, around, gradient_width, activations or [0] * len(sizes))
    count = max(min(round(work.micro_batches), MOST_MICRO_BATCHES), 1)
    seconds = _Streams(rows, ahead=ahead).run(count)
    if work.micro_batches > count:
        seconds += (work.micro_batches - count) * (seconds - _Streams(rows, ahead=ahead).run(count - 1))
    return seconds


@dataclass(frozen=True, kw_only=True)
class _Row:
    """Seconds of a row on each stream."""

    forward: float
    backward: float
    update: float
    """On the device."""
    fetch: float
    """Of weights."""
    read: float
    """From disk before that."""
    gradients: float
    """To the host; 0 where they stay until the update, and state as well."""
    gradients_back: float
    gradients_written: float
    host_update: float
    sent: float
    """New weights that stay on the device."""
    update_read: float
    update_written: float
    activations_out: float
    activations_back: float


def _rows(
    work: Work, table: Table, sizes: Sequence[Sizes], around: Surroundings, width: int, activations: Sequence[int]
) -> list[_Row]:
    weights = max(sum(size.weights for size in sizes), 1)
    states = max(sum(size.state for size in sizes), 1)
    return [
        _row(work, table.row(size.name), size, around, width, size.weights / weights, size.state / states, moved)
        for size, moved in zip(sizes, activations, strict=True)
    ]


def _row(
    work: Work, places: RowPlaces, size: Sizes, around: Surroundings, width: int, share: float, updated: float, activations: int
) -> _Row:
    away, host = places.weights != "device", places.state != "device"
    leave = size.gradients if places.gradients != "device" or host else 0
    on_disk = {kind: getattr(size, kind) * (getattr(places, kind) == "disk") for kind in ("weights", "gradients", "state")}
    return _Row(
        forward=share * work.forward,
        backward=share * work.backward,
        update=0.0 if host else updated * work.optimizer,
        fetch=size.weights * away / around.to_device,
        read=on_disk["weights"] / around.from_disk,
        gradients=leave / around.to_host,
        gradients_back=leave / around.to_device,
        gradients_written=on_disk["gradients"] / around.to_disk,
        host_update=size.gradients / width / around.updated if host else 0.0,
        sent=size.gradients / around.to_device if host and not away else 0.0,
        update_read=sum(on_disk.values()) / around.from_disk if host else 0.0,
        update_written=(on_disk["weights"] + on_disk["state"]) / around.to_disk if host else 0.0,
        activations_out=activations / around.to_host,
        activations_back=activations / around.to_device,
    )


@dataclass
class _Streams:
    """The tasks of a few steps."""

    rows: Sequence[_Row]
    ahead: bool = True
    tasks: list[Task] = field(default_factory=list)

    def run(self, micro_batches: int) -> float:
        """Seconds of the last of the steps."""
        updated: list[int] = []
        for _ in range(STEPS):
            updated = self._step(micro_batches, updated)
        ends = run_tasks(self.tasks)
        borders = [place for place, task in enumerate(self.tasks) if task.stream == _BORDER]
        return ends[borders[-1]] - ends[borders[-2]]

    def _add(self, stream: str, seconds: float, *after: int | None) -> int:
        self.tasks.append(Task(stream, seconds, tuple(place for place in after if place is not None)))
        return len(self.tasks) - 1

    def _step(self, micro_batches: int, before: Sequence[int]) -> list[int]:
        """The tasks of a step; those with which its rows are updated. `before`: those of the step before."""
        computed: list[int] = []  # of each visit
        sent: dict[int, int] = {}
        for number in range(micro_batches):
            kept: dict[int, int] = {}
            for place, row in enumerate(self.rows):
                updated = before[place] if before and not number else None
                self._visit(computed, row, row.forward, updated)
                if row.activations_out:
                    kept[place] = self._add("out", row.activations_out, computed[-1])
            for place, row in reversed(list(enumerate(self.rows))):
                needs = [sent[place + 2]] if place + 2 in sent else []  # gradients of so many rows are there at once
                if place in kept:
                    needs.append(self._add("in", row.activations_back, kept[place], self._slot(computed)))
                if number and row.gradients:
                    needs.append(self._add("in", row.gradients_back, sent[place], self._slot(computed)))
                self._visit(computed, row, row.backward, None, *needs, turning=place == len(self.rows) - 1)
                if row.gradients:
                    sent[place] = self._add("out", row.gradients, computed[-1])
                    if row.gradients_written:
                        sent[place] = self._add("disk", row.gradients_written, sent[place])
        self._add(_BORDER, 0.0, computed[-1])
        return self._update(computed[-1], *sent.values())

    def _slot(self, computed: Sequence[int]) -> int | None:
        """The visit after which there is room for what is fetched now."""
        behind = 2 if self.ahead else 1
        return computed[-behind] if len(computed) >= behind else None

    def _visit(
        self, computed: list[int], row: _Row, seconds: float, updated: int | None, *needs: int, turning: bool = False
    ) -> None:
        """A row computes; `turning`: its weights are still there."""
        fetched = None
        if row.fetch and not turning:
            room = self._slot(computed)
            read = self._add("disk", row.read, updated, room) if row.read else None
            fetched = self._add("in", row.fetch, updated, read, room)
        computed.append(self._add("compute", seconds, updated, fetched, *needs))

    def _update(self, *known: int) -> list[int]:
        """Row by row, when the norm is known: after these tasks. A row's next pass begins when it is updated."""
        done = []
        for row in self.rows:
            end = self._add("compute", row.update, *known)
            if row.host_update:
                read = self._add("disk", row.update_read, *known) if row.update_read else None
                end = self._add("host", row.host_update, read, *known)
                if row.update_written:
                    end = self._add("disk", row.update_written, end)
                if row.sent:
                    end = self._add("in", row.sent, end)
            done.append(end)
        return done
