"""What the search for a placement on an accelerator goes by: the rows of the model, their sizes, and the room on each tier."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import nn

from sartor.errors import JobError
from sartor.machine.memory import resident_bytes
from sartor.model import dissect, short_skeleton, skeleton
from sartor.model.rows import Row, find_rows
from sartor.plan.levels import Level, everything, host_bytes, levels, spilled
from sartor.plan.placed import accumulates, gradient_width, row_sizes
from sartor.plan.setting import Setting
from sartor.plan.strategy import Strategy
from sartor.plan.table import Sizes, Table
from sartor.predict.target import Target
from sartor.predict.verdict import TIGHT_SHARE
from sartor.step import make_trainable
from sartor.step.blockwise import is_blockwise
from sartor.step.optim import state_bytes


def cannot_offload(setting: Setting) -> str:
    """Why everything of this job stays on its accelerators; nothing where it need not."""
    job, machine = setting.job, setting.machine
    if machine.device.kind != "cuda":
        return f"the device is of kind {machine.device.kind}"
    if machine.devices > 1:
        return "what lives in main memory is moved to one accelerator so far, not to several"
    if job.quantise is not None:
        return "quantised weights stay where they are"
    if is_blockwise(job.training.optimizer):
        return f"{job.training.optimizer} updates what is on the device only"
    return ""


def asks_for_offload(setting: Setting) -> bool:
    """Whether the job wants everything below an accelerator. Raises JobError where it cannot have that."""
    wanted, reason = setting.job.strategy.placement, cannot_offload(setting)
    if wanted not in ("host", "disk") or setting.machine.device.kind == "cpu":
        return False
    if reason:
        raise JobError(
            f"`strategy.placement` is {wanted}, which this job cannot have", why=reason, remedy="strategy.placement=auto"
        )
    return True


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What is not enough, even with all elsewhere that can be; 0 where there is enough."""

    device_bytes: int = 0
    """That the device would have to have."""
    host_bytes: int = 0
    """The same of main memory."""
    untraced: str = ""
    """Why it cannot be said."""


class Ground:
    """Of one setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.sizes = cache(self._sizes)
        """Of rows; whether micro-batches accumulate decides how wide gradients are."""
        self.levels = cache(self._levels)

    @cached_property
    def model(self) -> nn.Module:
        """As it trains, on the meta device."""
        setting = self.setting
        model = skeleton(setting.source, dtype=setting.precision.load_dtype(adapter=setting.method.adapter))
        kind = setting.machine.device.kind
        return make_trainable(model, setting.job, setting.precision, recompute=False, meta=True, kind=kind)

    @cached_property
    def rows(self) -> list[Row]:
        return find_rows(self.model)

    @cached_property
    def blocks(self) -> list[str]:
        """Names of the rows that are blocks."""
        paths = {path for stack in dissect(self.model).stacks for path in stack.block_paths()}
        return [row.name for row in self.rows if row.name in paths]

    def units(self, traced: int) -> list[int]:
        """How many blocks each unit of a trace with so many units has."""
        setting = self.setting
        dtype = setting.precision.load_dtype(adapter=setting.method.adapter)
        _, reduction = short_skeleton(setting.source, dtype=dtype, singles=True)
        units = reduction.blocks()
        return units if len(units) == traced else [1] * traced  # where layers were not repeated, each is one

    def accumulates(self, strategy: Strategy) -> bool:
        """Whether a step has several micro-batches."""
        return accumulates(self.setting, strategy)

    def gradient_width(self, *, accumulated: bool) -> int:
        """Bytes of an element."""
        precision = self.setting.precision
        return gradient_width(precision, accumulated=accumulated) or int(getattr(torch, precision.trained).itemsize)

    def _sizes(self, accumulated: bool) -> tuple[Sizes, ...]:
        return row_sizes(self.rows, self.setting.precision, self.setting.job.training.optimizer, accumulated=accumulated)

    def _levels(self, accumulated: bool) -> list[Level]:
        wanted, sizes = self.setting.job.strategy.placement, self.sizes(accumulated)
        return everything(sizes, wanted) if wanted in ("host", "disk") else levels(sizes, blocks=self.blocks)

    @cached_property
    def outside(self) -> int:
        """Bytes of weights, gradients and state that are in no row."""
        inside = {id(parameter) for row in self.rows for parameter in row.parameters.values()}
        rest = [parameter for parameter in self.model.parameters() if id(parameter) not in inside]
        trained = [parameter for parameter in rest if parameter.requires_grad]
        setting, width = self.setting, self.gradient_width(accumulated=False)
        state = sum(state_bytes(p, setting.job.training.optimizer, setting.precision) for p in trained)
        return sum(p.numel() * p.element_size() for p in rest) + sum(p.numel() * width for p in trained) + state

    @property
    def tensor_room(self) -> int:
        """Of the device, for tensors, so that a forecast's upper end fits."""
        device = self.setting.machine.device
        target = Target.of(device)
        return int(TIGHT_SHARE * device.available_bytes) - target.context_bytes - target.workspace_bytes

    @cached_property
    def host_base(self) -> int:
        """The process on the host, without what is placed there."""
        return resident_bytes()

    def spilled(self, table: Table, *, accumulated: bool, activations: int = 0) -> Table | None:
        """With on disk what main memory cannot take beside so many bytes of activations; None where not even that is enough."""
        room = int(TIGHT_SHARE * self.setting.machine.host.available_bytes) - self.host_base - activations
        sizes = self.sizes(accumulated)
        if self.setting.job.strategy.placement == "host":
            return table if host_bytes(table, sizes) <= room else None
        return spilled(table, sizes, room)
