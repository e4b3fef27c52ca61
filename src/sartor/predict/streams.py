"""Streams that work side by side: what runs when, and what a step waits for.

A task runs on one stream, in the order of the list, when its stream is free and the tasks it depends on are done. Collectives are
rings (Thakur, Rabenseifner & Gropp 2005; NCCL and RCCL use them for large messages): alpha a message, bytes over beta. Pipelines:
GPipe (Huang et al. 2019, arXiv 1811.06965), 1F1B and its interleaved form (Narayanan et al. 2021, arXiv 2104.04473).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sartor.predict.operations import Group

# -- links ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Link:
    """A message of b bytes takes alpha + b / beta."""

    alpha_seconds: float
    bytes_per_second: float

    def seconds(self, size_bytes: float, messages: float = 1) -> float:
        return messages * self.alpha_seconds + size_bytes / self.bytes_per_second


@dataclass(frozen=True, kw_only=True)
class Network:
    """Links between devices: within a node, for each device; between nodes, for each node, shared by its devices."""

    devices_per_node: int = 1
    inside: Link | None = None
    between: Link | None = None

    def link(self, group: Group) -> Link | None:
        """The slowest link of a ring over the group's ranks; None where it is not known.

        A ring enters and leaves each node once. All groups that lie alongside this one use the network at the same time, so
        a group has the share of it that it has of the node's devices.
        """
        if not group.spans_nodes(self.devices_per_node):
            return self.inside
        if self.between is None:
            return None
        members = max(min(group.size, self.devices_per_node // group.stride), 1)
        share = self.between.bytes_per_second * members / self.devices_per_node
        if members > 1 and self.inside is not None:
            share = min(share, self.inside.bytes_per_second)
        return Link(alpha_seconds=self.between.alpha_seconds, bytes_per_second=share)


def collective_seconds(name: str, size_bytes: int, group: Group, link: Link) -> float:
    """`size_bytes` is the whole message: what a rank has after all_gather and broadcast, before reduce_scatter and all_reduce."""
    others = group.size - 1
    if others <= 0 and name != "send":
        return 0.0
    passed = size_bytes * others / group.size
    if name in ("all_gather", "reduce_scatter"):
        return link.seconds(passed, others)
    if name == "all_reduce":
        return link.seconds(2 * passed, 2 * others)
    if name == "all_to_all":
        return link.seconds(passed, others)
    return link.seconds(size_bytes)


# -- one device: blocks with communication beside them -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """A block in one pass: seconds of what it computes, and of what it sends."""

    compute: float
    gather: float = 0.0
    """Before it computes; may start when the block before that gathers something starts (FSDP2's prefetching)."""
    reduce: float = 0.0
    """After it computed, beside the blocks that follow."""
    inline: float = 0.0
    """While everything waits (tensor parallelism)."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds of a sequence of blocks: all, and of these at work."""

    seconds: float
    compute: float

    @property
    def exposed(self) -> float:
        """Communication that nothing hides."""
        return max(self.seconds - self.compute, 0.0)


def run_blocks(blocks: Sequence[Block]) -> Spent:
    """Blocks one after the other, their communication on a stream of its own. When a block starts, what the next one needs is
    gathered first, and then what earlier ones computed is reduced."""
    gathers = [block.gather for block in blocks if block.gather]
    sending = gathered = computing = 0.0  # when communication, the last gather, and compute will be through
    place = 0
    if gathers:
        sending = gathered = gathers[0]
    for block in blocks:
        ready = 0.0
        if block.gather:
            ready, place = gathered, place + 1
            if place < len(gathers):
                sending = gathered = max(sending, computing) + gathers[place]
        computing = max(computing, ready) + block.compute + block.inline
        if block.reduce:
            sending = max(sending, computing) + block.reduce
    return Spent(seconds=max(sending, computing), compute=sum(block.compute for block in blocks))


# -- any streams ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Task:
    """Work on a stream, for which other work has to be done."""

    stream: str
    seconds: float
    after: tuple[int, ...] = ()
    """Places of earlier tasks in the list."""


def run_tasks(tasks: Sequence[Task]) -> list[float]:
    """When each of them is done."""
    free: dict[str, float] = {}
    ends: list[float] = []
    for task in tasks:
        end = max([free.get(task.stream, 0.0), *(ends[place] for place in task.after)]) + task.seconds
        free[task.stream] = end
        ends.append(end)
    return ends


# -- pipelines -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """A micro-batch's pass through one virtual stage."""

    backward: bool
    stage: int
    micro_batch: int


def turns(schedule: str, rank: int, ranks: int, micro_batches: int, chunks: int = 1) -> list[Turn]:
    """What a rank does, in order. `schedule`: gpipe, 1f1b or interleaved, where a rank has `chunks` stages, `ranks` apart."""
    if schedule == "gpipe":
        forward = [Turn(False, rank, number) for number in range(micro_batches)]
        return forward + [Turn(True, rank, number) for number in range(micro_batches)]
    if schedule == "1f1b":
        forward, backward = ([Turn(late, rank, number) for number in range(micro_batches)] for late in (False, True))
        ahead = min(micro_batches, ranks - rank)
    else:
        order = [
            (chunk, first + number)
            for first in range(0, micro_batches, ranks)
            for chunk in range(chunks)
            for number in range(min(ranks, micro_batches - first))
        ]
        forward = [Turn(False, chunk * ranks + rank, number) for chunk, number in order]
        backward = [Turn(True, (chunks - 1 - chunk) * ranks + rank, number) for chunk, number in order]
        ahead = min(len(forward), 2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1)
    made = forward[:ahead]
    for later, done in zip(forward[ahead:], backward, strict=False):
        made += [done, later]
    return made + backward[len(forward) - ahead :]


def run_pipeline(
    forward: Sequence[float],
    backward: Sequence[float],
    *,
    ranks: int,
    micro_batches: int,
    schedule: str,
    send_seconds: float = 0.0,
) -> float:
    """Seconds until the last rank is done. `forward` and `backward`: of each virtual stage; stage s is on rank s mod `ranks`.
    Hidden states go to the next stage, and gradients back, in `send_seconds`, beside the computation."""
    stages = len(forward)
    queues = [turns(schedule, rank, ranks, micro_batches, stages // ranks) for rank in range(ranks)]
    done: dict[Turn, float] = {}
    free, at = [0.0] * ranks, [0] * ranks
    left = sum(len(queue) for queue in queues)
    while left:
        before = left
        for rank, queue in enumerate(queues):
            while at[rank] < len(queue) and (ready := _ready(queue[at[rank]], done, stages, send_seconds)) is not None:
                turn = queue[at[rank]]
                seconds = (backward if turn.backward else forward)[turn.stage]
                free[rank] = done[turn] = max(free[rank], ready) + seconds
                at[rank] += 1
                left -= 1
        assert left < before, "a schedule that waits for itself"
    return max(free)


def _ready(turn: Turn, done: dict[Turn, float], stages: int, send_seconds: float) -> float | None:
    """When what a turn needs is there; None where it has not been computed yet."""
    if turn.backward and turn.stage == stages - 1:
        return done.get(Turn(False, turn.stage, turn.micro_batch))
    if not turn.backward and turn.stage == 0:
        return 0.0
    neighbour = turn.stage + 1 if turn.backward else turn.stage - 1
    end = done.get(Turn(turn.backward, neighbour, turn.micro_batch))
    return None if end is None else end + send_seconds
