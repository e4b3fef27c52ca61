"""The time forecast: seconds of a step from what it computes and sends, and what follows for the job.

Pure functions of a traced step (`sartor.predict.operations`), rates (`sartor.predict.rates`) and links
(`sartor.predict.streams`): a strategy takes milliseconds.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sartor.machine.catalogue import DeviceModel
from sartor.parallel import Layout
from sartor.predict.fused import COMPILED
from sartor.predict.operations import Group, Operations, Segment
from sartor.predict.rates import Rates
from sartor.predict.streams import Block, Link, Network, Spent, collective_seconds, run_blocks, run_pipeline

MOST_SIMULATED = 4
"""Micro-batches that are simulated; each further one takes as long as the last of these did."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step does, on average, and how many there are."""

    micro_batches: float
    """Of a rank in a step; a whole number in a pipeline."""
    tokens: float
    """Real tokens of a step, of all ranks; padding not counted."""
    sequences: float
    """Examples of a step, of all ranks."""
    total_steps: int
    scale: float = 1.0
    """Time of the average micro-batch for that of the traced one."""


@dataclass(frozen=True, kw_only=True)
class Expenses:
    """What an hour takes; None where it is not known."""

    usd_per_hour: float | None = None
    watts: float | None = None
    """Of all devices, at most."""


@dataclass(frozen=True, kw_only=True)
class TimeForecast:
    """How long a step takes on average, and the job."""

    step_seconds: float
    interval_seconds: tuple[float, float]
    tokens_per_second: float
    sequences_per_second: float
    mfu: float
    """Model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311): of the devices' peak, without recomputation."""
    breakdown: dict[str, float]
    """Seconds of a step by kind: compute, communication (that nothing hides), bubble, optimizer."""
    job_hours: float
    """Of all steps; loading, evaluation and checkpoints not counted."""
    cost_usd: float | None = None
    energy_kwh: float | None = None
    notes: tuple[str, ...] = ()

    def taking(self, seconds: float, **changes: Any) -> TimeForecast:
        """The same work in steps of so many seconds. `changes`: other fields."""
        slower = seconds / self.step_seconds
        return dataclasses.replace(
            self,
            step_seconds=seconds,
            interval_seconds=(self.interval_seconds[0] * slower, self.interval_seconds[1] * slower),
            tokens_per_second=self.tokens_per_second / slower,
            sequences_per_second=self.sequences_per_second / slower,
            mfu=self.mfu / slower,
            job_hours=self.job_hours * slower,
            cost_usd=None if self.cost_usd is None else self.cost_usd * slower,
            energy_kwh=None if self.energy_kwh is None else self.energy_kwh * slower,
            **changes,
        )

    def to_mapping(self) -> dict[str, Any]:
        """As `sartor plan --json` prints it."""
        return {
            "step_seconds": self.step_seconds,
            "interval_seconds": list(self.interval_seconds),
            "tokens_per_second": self.tokens_per_second,
            "sequences_per_second": self.sequences_per_second,
            "mfu": self.mfu,
            "breakdown": dict(self.breakdown),
            "job_hours": self.job_hours,
            "cost_usd": self.cost_usd,
            "energy_kwh": self.energy_kwh,
            "notes": list(self.notes),
        }


def forecast_time(
    stages: Mapping[int, Operations],
    *,
    rates: Rates,
    layout: Layout,
    network: Network,
    work: Work,
    expenses: Expenses | None = None,
) -> TimeForecast:
    """The forecast of a traced step. `stages`: pipeline stage → what a rank of it computes in both traced steps; without a
    pipeline stage 0 alone. A stage that is missing is like the last one before it. Of a pipeline all micro-batches of a step were
    traced; elsewhere one is enough."""
    ranks = {index: _Rank(operations, rates, network) for index, operations in stages.items()}
    if layout.pipeline > 1:  # passes of several micro-batches are interleaved, which tells nothing of their number
        for rank in ranks.values():
            rank.micro_batches = round(work.micro_batches)
    if layout.pipeline == 1:
        spent, optimizer = ranks[0].step(work, reduce_once=layout.zero == 1 and layout.wrapped)
        bubble = 0.0
    else:
        spent, optimizer, bubble = _pipeline(ranks, layout, network, work)
    parts = {
        "compute": spent.compute - optimizer,
        "communication": spent.exposed,
        "bubble": bubble,
        "optimizer": optimizer,
    }
    seconds = sum(parts.values())
    hours = seconds * work.total_steps / 3600
    expenses = expenses or Expenses()
    unknown = sorted(set().union(*(rank.unknown for rank in ranks.values())))
    return TimeForecast(
        step_seconds=seconds,
        interval_seconds=(seconds * (1 - rates.spread), seconds * (1 + rates.spread)),
        tokens_per_second=work.tokens / seconds,
        sequences_per_second=work.sequences / seconds,
        mfu=_model_flops(ranks, layout, work) / seconds / layout.devices / rates.peak(ranks[0].main_dtype),
        breakdown=parts,
        job_hours=hours,
        cost_usd=None if expenses.usd_per_hour is None else hours * expenses.usd_per_hour,
        energy_kwh=None if expenses.watts is None else hours * expenses.watts / 1000,
        notes=tuple(f"the speed of the link {where} is not known: its messages are not counted" for where in unknown),
    )


INSIDE_ALPHA_SECONDS, BETWEEN_ALPHA_SECONDS = 1e-5, 3e-5
"""Of a message within a node and between nodes: what NCCL's tests show for small messages is of this order."""


def network_of(device: DeviceModel | None, devices_per_node: int, between: float | None) -> Network:
    """The links between devices of this kind, as published, and between their nodes (`between`: bytes a second)."""
    inside = device and (device.peer_link_bytes_per_second or device.host_link_bytes_per_second)
    return Network(
        devices_per_node=devices_per_node,
        inside=Link(alpha_seconds=INSIDE_ALPHA_SECONDS, bytes_per_second=inside) if inside else None,
        between=Link(alpha_seconds=BETWEEN_ALPHA_SECONDS, bytes_per_second=between) if between else None,
    )


def expenses_of(device: DeviceModel | None, devices: int, usd_per_hour: float | None) -> Expenses:
    """An hour of a whole machine: on demand, at the power that its devices may draw."""
    watts = device.tdp_watts if device else None
    return Expenses(usd_per_hour=usd_per_hour, watts=None if watts is None else watts * devices)


@dataclass
class _Rank:
    """What one rank does, with the time it takes."""

    operations: Operations
    rates: Rates
    network: Network
    unknown: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.traced = self.operations.step()
        compiled = any(operation.name in COMPILED for operation in self.traced.table)
        self.rates = self.rates.during(self.traced.footprint(), compiled=compiled)
        seconds = self.traced.seconds(self._compute_seconds)
        self._blocks = [
            (segment, self._block(segment, float(computed)))
            for segment, computed in zip(self.traced.segments, seconds, strict=True)
        ]
        self.micro_batches = 1 + max((part.micro_batch for part in self.traced.segments if part.kind == "forward"), default=0)

    @property
    def main_dtype(self) -> str:
        """The format in which most is computed."""
        flops: dict[str, int] = {}
        for _, operation, count in self.traced:
            flops[operation.dtype] = flops.get(operation.dtype, 0) + count * operation.flops
        return max(flops, key=flops.__getitem__, default="float32")

    def model_flops(self) -> float:
        """Of a micro-batch."""
        return sum(self.traced.total("flops", kind=kind) for kind in ("forward", "backward")) / self.micro_batches

    def step(self, work: Work, *, reduce_once: bool) -> tuple[Spent, float]:
        """All, and of that the optimizer's seconds. `reduce_once`: gradients are reduced in the last micro-batch only, so that
        those in the middle are like the first."""
        passes = [self._passes(number, work.scale) for number in range(self.micro_batches)]
        first, last, update = passes[0], passes[-1], self._update()
        if self.micro_batches == 1 and work.micro_batches >= 2:
            last = [*first, Block(self._accumulation_seconds())]
        middle = first if reduce_once and self.micro_batches > 1 else last
        count = max(min(int(work.micro_batches), MOST_SIMULATED), 1)
        spent = _run(_sequence(first, middle, last, count), update)
        more = work.micro_batches - count
        if more > 0:
            fewer = _run(_sequence(first, middle, last, count - 1), update)
            seconds, compute = spent.seconds - fewer.seconds, spent.compute - fewer.compute
            spent = Spent(seconds=spent.seconds + more * seconds, compute=spent.compute + more * compute)
        return spent, sum(block.compute for block in update)

    def one_way(self, *, backward: bool, scale: float) -> Spent:
        """The forward or backward pass of a micro-batch, on average."""
        blocks = self._select(lambda part: part.kind != "update" and (part.kind == "forward") != backward, scale)
        spent = run_blocks(blocks)
        return Spent(seconds=spent.seconds / self.micro_batches, compute=spent.compute / self.micro_batches)

    def update(self) -> Spent:
        return run_blocks(self._update())

    def send_bytes(self) -> int:
        """Of the largest message to a neighbour."""
        return max((o.read_bytes for _, o, _ in self.traced if o.name == "send"), default=0)

    def _passes(self, number: int, scale: float) -> list[Block]:
        return self._select(lambda part: part.kind != "update" and part.micro_batch == number, scale)

    def _update(self) -> list[Block]:
        return self._select(lambda part: part.kind == "update", 1.0)

    def _select(self, wanted: Any, scale: float) -> list[Block]:
        chosen = (
            itertools.repeat(_scaled(block, scale), part.times) for part, block in self._blocks if wanted(part) and part.times
        )
        return list(itertools.chain.from_iterable(chosen))

    def _compute_seconds(self, operation: Any, kind: str) -> float:
        return 0.0 if operation.family == "collective" else self.rates.seconds(operation, kind)

    def _block(self, segment: Segment, computed: float) -> Block:
        sent = {"gather": 0.0, "reduce": 0.0, "inline": 0.0}
        for place, count in segment.counts.items():
            operation = self.traced.table[place]
            if operation.family == "collective" and operation.name != "send" and operation.group is not None:
                role = "inline" if not operation.group.overlaps else "reduce"
                if role == "reduce" and operation.name in ("all_gather", "broadcast"):
                    role = "gather"
                sent[role] += count * self._message(operation.name, operation.read_bytes, operation.group)
        return Block(computed, **sent)

    def _message(self, name: str, size_bytes: int, group: Group) -> float:
        link = self.network.link(group)
        if link is None:
            if group.size > 1:
                self.unknown.add("between nodes" if group.spans_nodes(self.network.devices_per_node) else "inside of a node")
            return 0.0
        return collective_seconds(name, size_bytes, group, link)

    def _accumulation_seconds(self) -> float:
        """Of adding a micro-batch's gradients to those that are there: three times the bytes that clipping's norm reads once."""
        norms = [
            (operation, count)
            for segment, operation, count in self.traced
            if segment.phase.endswith("clip") and "norm" in operation.name
        ]
        return 3 * sum(count * self.rates.seconds(operation, "update") for operation, count in norms)


def _sequence(first: list[Block], middle: list[Block], last: list[Block], count: int) -> list[list[Block]]:
    """So many micro-batches; a single one reduces what it computed, as the last one does."""
    return [first, *[middle] * (count - 2), last] if count > 1 else [last][:count]


def _scaled(block: Block, scale: float) -> Block:
    return block if scale == 1.0 else Block(scale * block.compute, block.gather, block.reduce, scale * block.inline)


def _run(groups: Sequence[Sequence[Block]], update: Sequence[Block]) -> Spent:
    """Passes, then the update, which waits for everything."""
    passes, end = run_blocks([block for group in groups for block in group]), run_blocks(update)
    return Spent(seconds=passes.seconds + end.seconds, compute=passes.compute + end.compute)


def _pipeline(ranks: Mapping[int, _Rank], layout: Layout, network: Network, work: Work) -> tuple[Spent, float, float]:
    """Passes in the schedule's order, then the slowest stage's update."""
    of_stage = [ranks[max(known for known in ranks if known <= index)] for index in range(layout.pipeline)]
    forward = [rank.one_way(backward=False, scale=work.scale) for rank in of_stage]
    backward = [rank.one_way(backward=True, scale=work.scale) for rank in of_stage]
    link = network.link(Group(2, layout.devices // layout.pipeline)) or Link(alpha_seconds=0.0, bytes_per_second=float("inf"))
    passes = run_pipeline(
        [spent.seconds for spent in forward],
        [spent.seconds for spent in backward],
        ranks=layout.pipeline,
        micro_batches=round(work.micro_batches),
        schedule=layout.schedule,
        send_seconds=link.seconds(of_stage[0].send_bytes()),
    )
    slowest = max(range(layout.pipeline), key=lambda index: forward[index].seconds + backward[index].seconds)
    busy = Spent(
        seconds=work.micro_batches * (forward[slowest].seconds + backward[slowest].seconds),
        compute=work.micro_batches * (forward[slowest].compute + backward[slowest].compute),
    )
    update = max((rank.update() for rank in ranks.values()), key=lambda spent: spent.seconds)
    spent = Spent(seconds=busy.seconds + update.seconds, compute=busy.compute + update.compute)
    return spent, update.compute, passes - busy.seconds


def _model_flops(ranks: Mapping[int, _Rank], layout: Layout, work: Work) -> float:
    """Of a step, of all devices."""
    stages = [ranks[max(known for known in ranks if known <= index)] for index in range(layout.pipeline)]
    return (
        work.scale
        * work.micro_batches
        * sum(rank.model_flops() for rank in stages)
        * layout.tensor
        * layout.context
        * layout.data
    )
