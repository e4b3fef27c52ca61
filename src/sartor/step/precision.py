"""Number formats of a run: what trains, what is frozen, what the arithmetic is done in."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from sartor.job.schema import PrecisionJob


@dataclass(frozen=True, kw_only=True)
class Precision:
    """`mode` is one of float32, bf16-mixed, bf16 (never auto)."""

    mode: str

    @classmethod
    def resolve(cls, job: PrecisionJob, device_kind: str) -> Precision:
        if job.mode != "auto":
            return cls(mode=job.mode)
        return cls(mode="float32" if device_kind == "cpu" else "bf16-mixed")

    def load_dtype(self, *, adapter: bool) -> torch.dtype:
        """Format of the base model's weights; with adapters they are frozen, so mixed precision keeps them in bfloat16."""
        if self.mode == "float32" or (self.mode == "bf16-mixed" and not adapter):
            return torch.float32
        return torch.bfloat16

    def autocast(self, device_kind: str) -> contextlib.AbstractContextManager[object]:
        """The context of forward passes."""
        if self.mode == "bf16-mixed":
            return torch.autocast(device_kind, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def cast_trained(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Give the trained parameters their format: float32, or bfloat16 in mode bf16."""
        dtype = torch.bfloat16 if self.mode == "bf16" else torch.float32
        for parameter in parameters.values():
            parameter.data = parameter.data.to(dtype)
