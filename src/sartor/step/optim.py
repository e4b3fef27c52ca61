"""The optimizer and the learning rate: what PyTorch has, configured from the job."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sartor.job.schema import TrainingJob
from sartor.kernels.adam import RESIDUAL, MasterAdamW
from sartor.kernels.compact import CompactAdamW, moments_bytes
from sartor.step.blockwise import is_blockwise, make_blockwise
from sartor.step.precision import Precision


def make_optimizer(
    parameters: dict[str, nn.Parameter],
    job: TrainingJob,
    *,
    precision: Precision = Precision.of("float32"),  # noqa: B008 - frozen
    kind: str = "cpu",
    traced: bool = False,
) -> torch.optim.Optimizer:
    """The job's optimizer; AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) by default. Weight decay acts on matrices only.

    `kind`: of the device, or of the one that a `traced` model stands for.
    """
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": job.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if job.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0)
    options: dict[str, Any] = {"lr": 0.0, "betas": (job.betas[0], job.betas[1]), "eps": job.epsilon, "weight_decay": 0.0}
    start: dict[Tensor, Tensor] = {p: vars(p).pop(RESIDUAL) for p in parameters.values() if RESIDUAL in vars(p)}
    eight_bit = is_blockwise(job.optimizer)
    if precision.stochastic or (eight_bit and kind == "cpu"):
        seed = job.seed if precision.stochastic else None
        return CompactAdamW(groups, eight_bit=eight_bit, masters=precision.masters, rounding_seed=seed, start=start, **options)
    if precision.masters:
        return MasterAdamW(groups, start=start, **options)
    if eight_bit:
        return make_blockwise(job.optimizer, groups, traced=traced, **options)
    kernel: dict[str, Any] = {"fused": True} if job.optimizer == "adamw" else {"foreach": True}
    return torch.optim.AdamW(groups, **options, **kernel)


def state_bytes(parameter: Tensor, optimizer: str, precision: Precision) -> int:
    """What an optimizer of a run on a CPU keeps of a parameter that trains."""
    if optimizer == "sgd":
        return 0
    count, eight_bit = parameter.numel(), is_blockwise(optimizer)
    if not (eight_bit or precision.masters or precision.stochastic):
        return 2 * count * parameter.element_size()
    return moments_bytes(count, eight_bit=eight_bit) + (2 * count if precision.masters else 0)


def learning_rate(step: int, total_steps: int, job: TrainingJob, *, peak: float) -> float:
    """The rate of step `step` (from 0): linear warm-up to `peak`, then constant, linear or cosine to the final share."""
    warmup = job.warmup * total_steps if job.warmup < 1 else job.warmup
    if step < warmup:
        return peak * (step + 1) / (math.ceil(warmup) + 1)
    if job.schedule == "constant":
        return peak
    progress = (step - warmup) / max(total_steps - warmup, 1)
    shape = 1 - progress if job.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (job.final_rate + (1 - job.final_rate) * shape)
