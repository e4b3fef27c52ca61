"""Make a model trainable by the job's method: which parameters train, and in which format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sartor.errors import JobError
from sartor.job.schema import Job, QuantiseJob
from sartor.methods.adapters import NO_PACKING, check_quantised, peft_config, wrap
from sartor.model.quantise import quantise_skeleton, upcast

DEFAULT_RATES = {"full": 5e-5, "lora": 2e-4, "qlora": 2e-4, "prefix": 1e-2, "prompt": 1e-2, "peft": 2e-4}


@dataclass(frozen=True, kw_only=True)
class MethodTraits:
    """What the rest of the house needs to know about a method, before any model exists."""

    learning_rate: float
    virtual_tokens: int
    """Positions that the method takes from every row."""
    packing: bool
    """Whether several examples may share a row."""
    recompute: bool
    """Whether activations can be recomputed (PEFT's prefixes live in the cache that recomputation turns off)."""
    adapter: bool
    """Whether the base model stays frozen and only an adapter is saved."""


def traits(job: Job) -> MethodTraits:
    """The job's method in facts. Raises JobError for a wrong PEFT configuration."""
    virtual, prompt_learning = 0, job.method in NO_PACKING
    if job.method != "full":
        config = peft_config(job, meta=True)
        if job.quantise is not None:
            check_quantised(config)
        prompt_learning = config.is_prompt_learning
        virtual = int(config.num_virtual_tokens or 0) if prompt_learning else 0
    return MethodTraits(
        learning_rate=job.training.learning_rate or DEFAULT_RATES[job.method],
        virtual_tokens=virtual,
        packing=not prompt_learning,
        recompute=not (prompt_learning and _is_prefix(job)),
        adapter=job.method != "full",
    )


def _is_prefix(job: Job) -> bool:
    return job.method == "prefix" or "PREFIX" in str(peft_config(job, meta=True).peft_type)


def apply(model: nn.Module, job: Job, *, seed: int | None = None, meta: bool = False, kind: str = "cpu") -> nn.Module:
    """`model` as the job trains it: all of it, or frozen with PEFT's adapters. Adapters are initialised from `seed`.

    On `meta` the weights are quantised here, as a device of this `kind` has them; a real model comes quantised.
    """
    if seed is not None:
        torch.manual_seed(seed)
    if job.method == "full":
        return model.requires_grad_(True)
    config = peft_config(job, meta=meta)
    if job.quantise is not None:
        if meta:
            _quantise(model, config, job.quantise, kind)
        if job.quantise.upcast:
            upcast(model)
    wrapped = wrap(model, config, meta=meta)
    if not any(parameter.requires_grad for parameter in wrapped.parameters()):
        raise JobError("nothing would train: the PEFT configuration leaves every parameter frozen", remedy="check `peft`")
    return wrapped


def _quantise(model: nn.Module, config: Any, quantise: QuantiseJob, kind: str) -> None:
    from sartor.methods.quantised import register

    quantise_skeleton(model, quantise, kind=kind)
    if not config.is_prompt_learning:
        register(config)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of everything that trains, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
