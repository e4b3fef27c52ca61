"""Number formats of a run: what trains, what is frozen, what the arithmetic is done in."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass

import torch

from sartor.job.schema import PrecisionJob

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# mode: (frozen weights, what trains, autocast)
_MODES = {
    "float32": ("float32", "float32", "as-stored"),
    "bf16-mixed": ("bfloat16", "float32", "bfloat16"),
    "bf16": ("bfloat16", "bfloat16", "as-stored"),
}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Resolved formats, by torch's names; `compute` may be `as-stored` (no autocast)."""

    mode: str
    weights: str
    trained: str
    compute: str

    @classmethod
    def of(cls, mode: str) -> Precision:
        """One of the named modes: float32, bf16-mixed, bf16."""
        weights, trained, compute = _MODES[mode]
        return cls(mode=mode, weights=weights, trained=trained, compute=compute)

    @classmethod
    def resolve(cls, job: PrecisionJob, device_kind: str) -> Precision:
        """What the job says, on a device of this kind."""
        automatic = "float32" if device_kind == "cpu" else "bf16-mixed"
        base = cls.of(automatic if job.mode == "auto" else job.mode)
        if job.weights is None and job.trained is None and job.compute is None:
            return base
        return cls(
            mode="mixed",
            weights=job.weights or base.weights,
            trained=job.trained or base.trained,
            compute=job.compute or base.compute,
        )

    @property
    def needs_loss_scaling(self) -> bool:
        """Whether gradients are computed in float16, which underflows without a loss scale."""
        return "float16" in (self.trained, self.compute) or (self.compute == "as-stored" and self.weights == "float16")

    def gathered(self) -> Precision:
        """The same where FSDP2 gathers weights in the format of the arithmetic: autocast has nothing left to do."""
        return dataclasses.replace(self, compute="as-stored")

    def describe(self) -> str:
        if self.mode != "mixed":
            return self.mode
        return f"weights {self.weights}, trained {self.trained}, computed {self.compute}"

    def load_dtype(self, *, adapter: bool) -> torch.dtype:
        """Format in which the base model is loaded: frozen beside adapters, trained without."""
        return _DTYPES[self.weights if adapter else self.trained]

    def autocast(self, device_kind: str) -> contextlib.AbstractContextManager[object]:
        """The context of forward passes."""
        if self.compute == "as-stored":
            return contextlib.nullcontext()
        return torch.autocast(device_kind, dtype=_DTYPES[self.compute])

    def cast_trained(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Give the trained parameters their format."""
        for parameter in parameters.values():
            parameter.data = parameter.data.to(_DTYPES[self.trained])
