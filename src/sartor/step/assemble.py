"""From a bare model to the step that trains it: once for the forecast (meta, then fake tensors), once for the run."""

from __future__ import annotations

from torch import nn

from sartor.job.schema import Job
from sartor.kernels.fuse import fuse
from sartor.kernels.int8 import quantise_frozen
from sartor.kernels.prepack import prepack
from sartor.methods import apply, trained_parameters
from sartor.model import dissect
from sartor.step.optim import make_optimizer
from sartor.step.precision import Precision
from sartor.step.step import TrainStep, enable_recompute


def make_trainable(
    model: nn.Module,
    job: Job,
    precision: Precision,
    *,
    recompute: bool,
    seed: int | None = None,
    meta: bool = False,
    kind: str = "cpu",
) -> nn.Module:
    """`model` as the job trains it: method applied, trained parameters in their format, recomputation switched on.

    `kind`: of the device that a skeleton on `meta` stands for.
    """
    model = apply(model, job, seed=seed, meta=meta, kind=kind).train()
    if job.strategy.frozen_products == "int8":
        for stack in dissect(model).stacks:
            quantise_frozen(model.get_submodule(stack.path))
    if job.strategy.prepack is True:
        prepack(model)
    precision.cast_trained(trained_parameters(model))
    if recompute:
        enable_recompute(model)
    return model


def make_step(
    model: nn.Module, job: Job, precision: Precision, *, device_kind: str, reduce_once: bool = False, kind: str = ""
) -> TrainStep:
    """The optimizer step of a trainable model. `reduce_once`: a sharded model's gradients, after the last micro-batch only.
    `kind`: of the device that a traced model stands for."""
    parameters = trained_parameters(model)
    if job.strategy.fused and (kind or device_kind) == "cpu":
        fuse(model)
    return TrainStep(
        model,
        parameters,
        make_optimizer(parameters, job.training, precision=precision, kind=kind or device_kind, traced=bool(kind)),
        precision=precision,
        device_kind=device_kind,
        clip_norm=job.training.clip_norm,
        loss=job.training.loss,
        reduce_once=reduce_once,
        kind=kind,
    )
