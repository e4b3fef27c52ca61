"""When a step runs out of memory all the same: say how the forecast was wrong, plan again with that, go on from the last step."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sartor.errors import DoesNotFit, RunError
from sartor.job.units import format_bytes
from sartor.kernels import arena
from sartor.kernels.prepack import unpack
from sartor.machine import Machine
from sartor.machine.heap import give_back_freed_memory
from sartor.machine.memory import peak_resident_bytes, resident_bytes
from sartor.model import choose_recomputed
from sartor.placement import PlacedStep
from sartor.plan import Plan, make
from sartor.plan.placed import demoted, row_sizes
from sartor.predict.heap import LOADED_BYTES
from sartor.step.step import enable_recompute
from sartor.train.setup import Workbench

_REFUSED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMG]iB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")
LESS = 0.98
"""A new plan needs at most this share of what the old one was forecast to need."""


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """Memory ran out."""

    requested_bytes: int
    """By the allocation that failed, as far as its message says."""
    updating: bool
    """While weights changed: they cannot be trusted."""


def shortage_of(error: BaseException, bench: Workbench) -> Shortage | None:
    """What an error says of memory; None for one that is about something else. The reserve is given back."""
    text = str(error)
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if not known and not any(sign in text.lower() for sign in _SIGNS):
        return None
    bench.reserve.give_back()
    refused = _REFUSED.search(text)
    requested = int(float(refused[1]) * _UNITS[refused[2].lower()]) if refused else 0
    return Shortage(requested_bytes=requested, updating=bench.step.updating)


def clear_up(bench: Workbench) -> None:
    """Let go of what the step held that failed."""
    bench.step.discard()
    if isinstance(bench.step, PlacedStep):
        bench.step.engine.clear()
    gc.collect()
    give_back_freed_memory()


def recover(plan: Plan, bench: Workbench, shortage: Shortage, step: int, say: Callable[[str], None]) -> Plan:
    """The plan to go on with, already applied to the live model. The global batch, and with it the result, stays.

    Raises RunError where nothing smaller is left, or where memory ran out while weights were updated.
    """
    measured, forecast = _measured_and_forecast(plan, shortage)
    wrong = _told(plan, shortage, step)
    if shortage.updating:
        raise RunError(
            wrong,
            why="it ran out while the weights were updated, so they cannot be gone on with",
            remedy="--resume goes on from the last checkpoint; a smaller strategy.micro_batch, or other programs closed, first",
        )
    if bench.world.size > 1:
        raise RunError(
            wrong,
            why="the other processes of the step are waiting, and cannot go on differently",
            remedy="--resume with a smaller strategy.micro_batch, or with fewer strategy.processes",
        )
    arena.give_back()
    if isinstance(bench.step, PlacedStep) and (less := _with_more_on_disk(plan, bench.step, shortage)) is not None:
        bench.reserve.hold()
        say(f"{wrong}. Going on with: {less.strategy.describe()}")
        return less
    room = min(plan.forecast.available_bytes * forecast // max(measured, forecast), measured, int(LESS * forecast))
    try:
        smaller = make(plan.job, _with_room(plan, room))
    except DoesNotFit as error:
        if (least := _least(plan)) is None:
            raise RunError(wrong, why=error.what, remedy=error.remedy) from None
        smaller = least
    strategy = dataclasses.replace(
        plan.strategy,
        micro_batch=smaller.strategy.micro_batch,
        recompute=smaller.strategy.recompute,
        recomputed=smaller.strategy.recomputed,
        prepack=plan.strategy.prepack and smaller.strategy.prepack,
    )
    if strategy == plan.strategy:
        raise RunError(wrong, why="no other strategy needs less", remedy="a shorter data.max_length, or another method")
    if not strategy.prepack:
        unpack(bench.step.model)
    if strategy.recompute:
        choose_recomputed(bench.step.model, strategy.recomputed)
        enable_recompute(bench.step.model)
    bench.reserve.hold()
    say(f"{wrong}. Going on with: {strategy.describe()}")
    return dataclasses.replace(plan, strategy=strategy, forecast=smaller.forecast, time=smaller.time)


def update(plan: Plan, bench: Workbench, rate: float, step: int, say: Callable[[str], None]) -> Plan:
    """Take the optimizer step at this rate. Where memory runs out in that of a placed run, more goes to disk, and what is left of
    the update is taken; the plan to go on with.

    Raises the error as it came where some of a row's tensors have changed already, or where nothing more can go.
    """
    while True:
        try:
            bench.step.update(rate)
            return plan
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(bench.step, PlacedStep) and bench.step.can_go_on):
                raise
            shortage = shortage_of(error, bench)
            wrong = "" if shortage is None else _told(plan, shortage, step)
            bench.step.engine.clear()
            less = None if shortage is None else _with_more_on_disk(plan, bench.step, shortage)
            if less is None:
                raise
            plan = less
        bench.reserve.hold()
        say(f"{wrong}. Going on with the update: {plan.strategy.describe()}")


def _measured_and_forecast(plan: Plan, shortage: Shortage) -> tuple[int, int]:
    """Bytes of the process."""
    measured = _measured(plan) + shortage.requested_bytes
    return measured, plan.forecast.process_bytes or measured


def _told(plan: Plan, shortage: Shortage, step: int) -> str:
    """What happened, in words."""
    measured, forecast = _measured_and_forecast(plan, shortage)
    return (
        f"memory ran out in step {step + 1}, at {format_bytes(measured)}; forecast were {format_bytes(forecast)} "
        f"of {format_bytes(plan.forecast.available_bytes)}"
    )


def _with_more_on_disk(plan: Plan, step: PlacedStep, shortage: Shortage) -> Plan | None:
    """The same strategy with less in memory, already so; the numbers stay the same to the bit. None where nothing can go."""
    placement = plan.strategy.placement
    assert placement is not None, "its step is placed"
    sizes = row_sizes(
        [live.row for live in step.engine.rows],
        plan.strategy.precision,
        plan.job.training.optimizer,
        accumulated=plan.strategy.micro_batch < plan.job.training.global_batch,
    )
    less = demoted(placement, sizes, at_least=shortage.requested_bytes)
    if less is None:
        return None
    step.rearrange(less.table, limit=less.limit_bytes, update_limit=less.update_limit_bytes)
    saved = placement.memory_bytes(sizes) - less.memory_bytes(sizes)
    process = plan.forecast.process_bytes
    forecast = dataclasses.replace(plan.forecast, process_bytes=None if process is None else process - saved)
    return dataclasses.replace(plan, strategy=dataclasses.replace(plan.strategy, placement=less), forecast=forecast)


def _least(plan: Plan) -> Plan | None:
    """Of what the job leaves open, the plan that needs least, whatever was measured: where memory ran out says little of how
    much there is. None where it needs no less than `plan` or does not fit at all."""
    open_ = plan.job.strategy
    found = []
    for recompute in ("none", "full") if open_.recompute == "auto" else (open_.recompute,):
        micro_batch = 1 if open_.micro_batch == "auto" else open_.micro_batch
        prepack = open_.prepack is True
        pinned = dataclasses.replace(open_, micro_batch=micro_batch, recompute=recompute, prepack=prepack)
        with contextlib.suppress(DoesNotFit):
            found.append(make(dataclasses.replace(plan.job, strategy=pinned), _with_room(plan, plan.forecast.available_bytes)))
    least = min(found, key=_needs, default=None)
    return least if least is not None and _needs(least) < _needs(plan) else None


def _needs(plan: Plan) -> int:
    """Bytes beyond those of the process when the plan was made."""
    forecast = plan.forecast
    return (forecast.process_bytes or forecast.available_bytes) - forecast.baseline_bytes


def _measured(plan: Plan) -> int:
    """Bytes of the process when memory ran out."""
    if plan.machine.device.kind == "cpu":
        return peak_resident_bytes()
    index = plan.machine.device.index
    reserved = torch.accelerator.max_memory_reserved(index)
    torch.accelerator.empty_cache()
    return reserved + plan.forecast.baseline_bytes


def _with_room(plan: Plan, room: int) -> Machine:
    """The plan's machine with so much memory for the process. On a CPU the process holds the model by now, and a forecast starts
    from what the process holds."""
    machine = plan.machine
    if machine.device.kind == "cpu":
        room += resident_bytes() + LOADED_BYTES - plan.forecast.baseline_bytes
    return dataclasses.replace(machine, device=dataclasses.replace(machine.device, total_bytes=room, available_bytes=room))
