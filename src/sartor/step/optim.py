"""The optimizer and the learning rate: what PyTorch has, configured from the job."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sartor.job.schema import TrainingJob
from sartor.kernels.adam import RESIDUAL, MasterAdamW
from sartor.step.blockwise import is_blockwise, make_blockwise


def make_optimizer(
    parameters: dict[str, nn.Parameter], job: TrainingJob, *, masters: bool = False, kind: str = ""
) -> torch.optim.Optimizer:
    """The job's optimizer; AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) by default. Weight decay acts on matrices only.

    `masters`: the parameters are bfloat16 halves of float32 (`sartor.kernels.adam`). `kind`: of the device that a traced model
    stands for.
    """
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": job.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if masters:
        start: dict[Tensor, Tensor] = {p: vars(p).pop(RESIDUAL) for p in parameters.values() if RESIDUAL in vars(p)}
        betas = (job.betas[0], job.betas[1])
        return MasterAdamW(groups, lr=0.0, betas=betas, eps=job.epsilon, weight_decay=0.0, start=start)
    if job.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0)
    if is_blockwise(job.optimizer):
        return make_blockwise(job.optimizer, groups, kind=kind, betas=(job.betas[0], job.betas[1]), eps=job.epsilon)
    kernel = {"fused": True} if job.optimizer == "adamw" else {"foreach": True}
    return torch.optim.AdamW(groups, lr=0.0, betas=(job.betas[0], job.betas[1]), eps=job.epsilon, **kernel)


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
