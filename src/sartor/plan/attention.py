"""Which attention a job is run with."""

from __future__ import annotations

import torch

from sartor.errors import JobError
from sartor.job import Job
from sartor.kernels.attention import NAME as SEGMENTS
from sartor.kernels.attention import unsuited
from sartor.machine import Machine
from sartor.methods import MethodTraits
from sartor.model import ModelSource, short_skeleton


def choose_attention(job: Job, method: MethodTraits, source: ModelSource, machine: Machine) -> tuple[str | None, str]:
    """transformers' name of the attention, None to leave it to transformers, and what is said where `segments` cannot be.

    Raises JobError where the job pins `segments` and it cannot be.
    """
    wanted, on_cpu = job.strategy.attention, machine.device.kind == "cpu"
    if wanted not in ("auto", SEGMENTS):
        return wanted, ""
    if wanted == "auto" and not on_cpu:
        return None, ""
    if not on_cpu:
        why = "it is for CPUs"
    elif method.virtual_tokens:
        why = f"method {job.method} puts virtual tokens before a row"
    else:
        model, _ = short_skeleton(source, dtype=torch.bfloat16, attention=SEGMENTS)
        why = unsuited(model)
    if not why:
        return SEGMENTS, ""
    if wanted == SEGMENTS:
        raise JobError("`strategy.attention` is segments, which this job cannot have", why=why, remedy="strategy.attention=auto")
    return None, f"attention as transformers has it, since segments cannot be: {why}"
