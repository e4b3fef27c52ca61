"""Frozen weights laid out once for the products of a CPU that multiplies tiles: where a job may have them, and where it does."""

from __future__ import annotations

import dataclasses

from torch import nn

from sartor.errors import JobError
from sartor.job import Job
from sartor.job.units import format_bytes
from sartor.kernels.matmul import has_tiles
from sartor.kernels.prepack import prepacked_bytes
from sartor.machine import Machine
from sartor.methods import MethodTraits
from sartor.plan.search import Choice, search
from sartor.plan.setting import Setting
from sartor.plan.strategy import Strategy
from sartor.step import Precision

_TILES = "amx_bf16"
MOST_SHARE = 0.25
"""Of memory, for all copies, where the job leaves it open: a model has to leave room for longer examples and other work."""


def can_prepack(job: Job, machine: Machine, method: MethodTraits, precision: Precision) -> str:
    """Why a job's frozen weights cannot be laid out once, or nothing."""
    strategy = job.strategy
    if machine.device.kind != "cpu":
        return f"it is for CPUs, and the job computes on {machine.device.torch_name}"
    if _TILES not in machine.instruction_sets or not (machine.elsewhere or has_tiles()):
        return f"it is for products by tiles, which need a CPU with {_TILES} and a C++ compiler"
    if not method.adapter or job.quantise is not None:
        return f"no weights are frozen in bfloat16: the method is {job.method}"
    if precision.weights != "bfloat16" or precision.compute != "as-stored":
        return f"no products are computed in bfloat16 as weights are stored: the precision is {precision.describe()}"
    if not strategy.fused or strategy.frozen_products != "exact":
        return "it is for the products of strategy.fused=true with strategy.frozen_products=exact"
    return "what lives on disk is fetched as it is stored (strategy.placement)" if strategy.placement == "disk" else ""


def wants_prepack(job: Job, machine: Machine, method: MethodTraits, precision: Precision, model: nn.Module) -> bool:
    """Whether to plan with it. Raises JobError where the job asks for what it cannot have."""
    wanted = job.strategy.prepack
    if wanted is False:
        return False
    reason = can_prepack(job, machine, method, precision)
    if wanted is True and reason:
        raise JobError("`strategy.prepack` is true, which this job cannot have", why=reason, remedy="strategy.prepack=auto")
    processes = 1 if job.strategy.processes == "auto" else job.strategy.processes
    small = processes * prepacked_bytes(model) <= MOST_SHARE * machine.device.total_bytes
    return wanted is True or (small and not reason)


def search_for(job: Job, setting: Setting, longest: int) -> tuple[Setting, Choice]:
    """What fits best, and the setting of it: where `job` leaves open whether frozen weights are laid out once and the setting has
    it so, without, if it would take other memory that the run can use."""
    choice = search(setting, longest)
    if job.strategy.prepack != "auto" or not choice.strategy.prepack:
        return setting, choice
    recomputes = choice.strategy.recompute and job.strategy.recompute == "auto"
    if choice.forecast.verdict == "fits" and not recomputes:
        return setting, choice
    setting = dataclasses.replace(setting, job=with_prepack(setting.job, False))
    return setting, search(setting, longest)


def with_prepack(job: Job, prepack: bool) -> Job:
    """The job with this decided."""
    return dataclasses.replace(job, strategy=dataclasses.replace(job.strategy, prepack=prepack))


def prepack_note(strategy: Strategy, model: nn.Module) -> str:
    """What a plan says of it."""
    if not strategy.prepack:
        return ""
    size = format_bytes(strategy.processes * prepacked_bytes(model))
    return f"frozen weights are laid out once for products by tiles, which takes {size} more (strategy.prepack=false)"
