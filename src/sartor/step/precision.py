"""Number formats of a run: what trains, what is frozen, what the arithmetic is done in."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

import torch

from sartor.errors import JobError
from sartor.job.schema import PrecisionJob
from sartor.kernels.adam import RESIDUAL, split

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# mode: (frozen weights, what trains, autocast)
_MODES = {
    "float32": ("float32", "float32", "as-stored"),
    "bf16-mixed": ("bfloat16", "float32", "bfloat16"),
    "bf16": ("bfloat16", "bfloat16", "as-stored"),
    "bf16-master": ("bfloat16", "bfloat16", "as-stored"),
}
_PIECEWISE = ("adamw", "adamw-8bit")
"""Optimizers that on a CPU are Sartor's own where the precision asks for it."""
FAST_BF16 = ("avx512_bf16", "amx_bf16")
"""Instruction sets with which a CPU multiplies bfloat16 several times as fast as float32."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Resolved formats, by torch's names; `compute` may be `as-stored` (no autocast)."""

    mode: str
    weights: str
    trained: str
    compute: str
    rounding: str = "nearest"
    """Of updated weights: to the `nearest`, or `stochastic`."""

    @classmethod
    def of(cls, mode: str) -> Precision:
        """One of the named modes: float32, bf16-mixed, bf16, bf16-master."""
        weights, trained, compute = _MODES[mode]
        return cls(mode=mode, weights=weights, trained=trained, compute=compute)

    @classmethod
    def resolve(
        cls, job: PrecisionJob, device_kind: str, *, instruction_sets: Collection[str] = (), optimizer: str = "adamw"
    ) -> Precision:
        """What the job says, on a device of this kind; on a CPU, with these instructions. Raises JobError."""
        single = job.weights is None and job.trained is None and job.compute is None
        if job.mode == "bf16-master":
            _check_master(device_kind, optimizer, single=single)
        fast = single and optimizer in _PIECEWISE and any(name in FAST_BF16 for name in instruction_sets)
        automatic = ("bf16-master" if fast else "float32") if device_kind == "cpu" else "bf16-mixed"
        if job.rounding == "stochastic":
            automatic = "bf16"
        made = cls.of(automatic if job.mode == "auto" else job.mode)
        if not single:
            made = cls(
                mode="mixed",
                weights=job.weights or made.weights,
                trained=job.trained or made.trained,
                compute=job.compute or made.compute,
            )
        made = dataclasses.replace(made, rounding=job.rounding)
        if made.stochastic:
            _check_stochastic(made, device_kind, optimizer)
        return made

    @property
    def masters(self) -> bool:
        """Whether what trains is kept as float32 in two halves: a bfloat16 weight and a residual (`sartor.kernels.adam`)."""
        return self.mode == "bf16-master"

    @property
    def stochastic(self) -> bool:
        """Whether updated weights are rounded by chance (`sartor.kernels.compact`)."""
        return self.rounding == "stochastic"

    @property
    def needs_loss_scaling(self) -> bool:
        """Whether gradients are computed in float16, which underflows without a loss scale."""
        return "float16" in (self.trained, self.compute) or (self.compute == "as-stored" and self.weights == "float16")

    def gathered(self) -> Precision:
        """The same where FSDP2 gathers weights in the format of the arithmetic: autocast has nothing left to do."""
        return dataclasses.replace(self, compute="as-stored")

    def describe(self) -> str:
        by_chance = ", rounded stochastically" if self.stochastic else ""
        if self.mode != "mixed":
            return self.mode + by_chance
        return f"weights {self.weights}, trained {self.trained}, computed {self.compute}{by_chance}"

    def load_dtype(self, *, adapter: bool) -> torch.dtype:
        """Format in which the base model is loaded: frozen beside adapters, trained without (masters: with all their bits)."""
        if self.masters and not adapter:
            return torch.float32
        return _DTYPES[self.weights if adapter else self.trained]

    def autocast(self, device_kind: str) -> contextlib.AbstractContextManager[object]:
        """The context of forward passes."""
        if self.compute == "as-stored":
            return contextlib.nullcontext()
        return torch.autocast(device_kind, dtype=_DTYPES[self.compute])

    def cast_trained(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Give the trained parameters their format. The residual of a master waits at its parameter for the optimizer."""
        for parameter in parameters.values():
            if self.masters and RESIDUAL in vars(parameter):
                continue  # split when it was read
            if self.masters:
                parameter.data, residual = split(parameter.data.float())
                setattr(parameter, RESIDUAL, residual)
            elif parameter.dtype != _DTYPES[self.trained]:
                parameter.data = parameter.data.to(_DTYPES[self.trained])


def _check_master(device_kind: str, optimizer: str, *, single: bool) -> None:
    """Raises JobError where masters in two halves are not for this job."""
    if device_kind not in ("cpu", "cuda"):
        why, remedy = f"its optimizer is for CPUs and CUDA, this device is of kind {device_kind}", "precision=bf16-mixed"
    elif optimizer not in (_PIECEWISE if device_kind == "cpu" else ("adamw",)):
        why, remedy = f"the residuals belong to AdamW's state, the job's optimizer is {optimizer}", "training.optimizer=adamw"
    elif not single:
        why, remedy = "the mode decides all formats", "the mode alone, without `weights`, `trained` and `compute`"
    else:
        return
    raise JobError("`precision` is bf16-master, which this job cannot have", why=why, remedy=remedy)


def _check_stochastic(precision: Precision, device_kind: str, optimizer: str) -> None:
    """Raises JobError where weights cannot be rounded by chance."""
    if device_kind != "cpu":
        why, remedy = f"the optimizer is written for CPUs, this device is of kind {device_kind}", "precision.rounding=nearest"
    elif optimizer not in _PIECEWISE:
        why, remedy = f"it is part of Sartor's AdamW, the job's optimizer is {optimizer}", "training.optimizer=adamw"
    elif precision.masters:
        why, remedy = (
            "the residuals of bf16-master keep what rounding loses",
            "precision.mode=bf16, or precision.rounding=nearest",
        )
    elif precision.trained != "bfloat16":
        why, remedy = f"what trains is {precision.trained}, of which nothing is rounded away", "precision.mode=bf16"
    else:
        return
    raise JobError("`precision.rounding` is stochastic, which this job cannot have", why=why, remedy=remedy)
