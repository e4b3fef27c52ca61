"""The plan of inference: what answers need on a machine, and how long or how many they may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sartor.errors import DoesNotFit, JobError
from sartor.job import Job, to_mapping
from sartor.job.schema import QuantiseJob
from sartor.job.units import format_bytes
from sartor.machine import Machine, probe
from sartor.methods import traits
from sartor.model import ModelSource, check_trainable, outline, quantise_skeleton, resolve, short_skeleton, skeleton
from sartor.model.regions import Reduction
from sartor.plan.plan import SCHEMA_VERSION, _plain
from sartor.predict.generation import Request
from sartor.predict.inference import PATIENCE_SECONDS, InferenceForecast, InferenceForecaster

LONGEST = 2**20
"""Tokens that are tried at most, for models that name no limit."""
LARGEST_BATCH = 4096
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class InferencePlan:
    """What generation needs. `longest_prompt` and `largest_batch`: what runs with a margin, the other left as it is; None where
    that was not looked for."""

    job: Job
    machine: Machine
    dtype: str
    parameters: int
    request: Request
    forecast: InferenceForecast
    longest_prompt: int | None
    largest_batch: int | None
    position_limit: int | None
    notes: tuple[str, ...]

    def to_mapping(self) -> dict[str, Any]:
        """As `sartor plan --inference --json` prints it (docs/inference.md)."""
        forecast = self.forecast.memory.to_mapping()
        device = forecast["device"][0]
        device["expandable_bytes"] = self.forecast.expandable_bytes
        return {
            "schema_version": SCHEMA_VERSION,
            "plan": "inference",
            "verdict": forecast["verdict"],
            "job": to_mapping(self.job),
            "machine": _plain(self.machine),
            "inference": {**_plain(self.request), "dtype": self.dtype},
            "parameters": self.parameters,
            "forecast": forecast,
            "cache_bytes": self.forecast.cache_bytes,
            "longest_prompt": self.longest_prompt,
            "largest_batch": self.largest_batch,
            "position_limit": self.position_limit,
            "notes": list(self.notes),
        }


def make_inference(job: Job, machine: Machine | None = None) -> InferencePlan:
    """The plan of the job's `inference` on `machine` (the job's by default). Needs no weights, no data and no accelerator.

    Raises JobError, ModelError, or DoesNotFit.
    """
    machine, source = _place(job, machine)
    request, notes = _request(job, source)
    forecaster = _forecaster(job, source, machine)
    forecast = forecaster.forecast(request)
    if forecast.memory.verdict == "does not fit":
        raise _does_not_fit(job, source, machine, request, forecaster, forecast)
    known = forecast.memory.verdict != "cannot say" and forecast.memory.trace_seconds < PATIENCE_SECONDS
    limit = (source.max_positions or LONGEST) - request.answer
    return InferencePlan(
        job=job,
        machine=machine,
        dtype=_dtype_name(job, source, machine),
        parameters=_parameters(source),
        request=request,
        forecast=forecast,
        longest_prompt=_longest_prompt(forecaster, request, limit) if known else None,
        largest_batch=_largest_batch(forecaster, job, request, LARGEST_BATCH) if known else None,
        position_limit=source.max_positions,
        notes=(*notes, *_cache_note(source, forecast), *_allocator_note(forecast)),
    )


def forecast_inference(job: Job, machine: Machine | None = None) -> InferenceForecast:
    """The forecast alone, whatever its verdict. Raises JobError or ModelError."""
    machine, source = _place(job, machine)
    return _forecaster(job, source, machine).forecast(_request(job, source)[0])


def _place(job: Job, machine: Machine | None) -> tuple[Machine, ModelSource]:
    source = resolve(job.model)
    check_trainable(source)
    machine = machine or probe(job.machine)
    if machine.devices > 1:
        raise JobError(
            f"machine {machine.elsewhere!r} has {machine.devices} devices",
            why="inference is planned for one device",
            remedy=f"machine={machine.elsewhere.partition('x')[2]}" if machine.nodes == 1 else "the name of one device",
        )
    return machine, source


def _request(job: Job, source: ModelSource) -> tuple[Request, list[str]]:
    """What is traced, and what is said about it."""
    wanted, notes = job.inference, []
    prompt = wanted.prompt
    if virtual := traits(job).virtual_tokens if job.method in ("prefix", "prompt") else 0:
        prompt += virtual
        notes.append(f"{virtual} virtual tokens of method {job.method} are part of the prompt")
    elif job.method != "full" and _has_adapter(Path(job.output)):
        notes.append(f"the adapter in {job.output} counts as merged into the weights")
    limit = source.max_positions
    if limit is not None and prompt + wanted.answer > limit:
        raise JobError(
            f"prompt and answer are {prompt + wanted.answer:,} tokens, the model has {limit:,} positions",
            remedy=f"e.g. inference.prompt={limit - wanted.answer}"
            if limit > wanted.answer
            else f"inference.answer={limit // 2} and as much for the prompt",
        )
    request = Request(
        batch=wanted.batch,
        prompt=prompt,
        answer=wanted.answer,
        cache=wanted.cache,
        padded=_padded(job, wanted.batch),
        sampling=wanted.sampling,
    )
    return request, notes


def _padded(job: Job, batch: int) -> bool:
    return batch > 1 if job.inference.padded == "auto" else job.inference.padded


def _has_adapter(run: Path) -> bool:
    return any(run.glob("adapter_config.json")) or any(run.glob("checkpoint-*/adapter_config.json"))


def _dtype_name(job: Job, source: ModelSource, machine: Machine) -> str:
    """The weights' format: asked for, else as transformers loads them, else what suits the device."""
    if job.inference.dtype != "auto":
        return job.inference.dtype
    stored = str(getattr(source.config, "dtype", None) or "").removeprefix("torch.")
    return stored if stored in _DTYPES else "float32" if machine.device.kind == "cpu" else "bfloat16"


def _forecaster(job: Job, source: ModelSource, machine: Machine) -> InferenceForecaster:
    attention = None if job.strategy.attention == "auto" else job.strategy.attention

    def make_model(shortened: bool) -> tuple[nn.Module, Reduction]:
        dtype = _DTYPES[_dtype_name(job, source, machine)]
        if shortened:
            model, reduction = short_skeleton(source, dtype=dtype, attention=attention)
        else:
            model, reduction = skeleton(source, dtype=dtype, attention=attention), Reduction()
        if job.quantise is not None:
            quantise_skeleton(model, job.quantise, kind=machine.device.kind)
        return model, reduction

    return InferenceForecaster(make_model, machine)


def _parameters(source: ModelSource) -> int:
    return sum(parameter.numel() for parameter in outline(source, dtype=torch.bfloat16).parameters())


def _longest_prompt(forecaster: InferenceForecaster, request: Request, limit: int) -> int:
    return forecaster.largest(lambda size: dataclasses.replace(request, prompt=size), request.prompt, limit)


def _largest_batch(forecaster: InferenceForecaster, job: Job, request: Request, limit: int) -> int:
    return forecaster.largest(
        lambda size: dataclasses.replace(request, batch=size, padded=_padded(job, size)), request.batch, limit
    )


def _cache_note(source: ModelSource, forecast: InferenceForecast) -> Iterator[str]:
    if not forecast.cache_bytes and forecast.memory.peak is not None:
        reason = "" if getattr(source.config, "use_cache", True) else ": `use_cache` is off in its configuration"
        yield f"no cache of keys and values was found, every token goes through the whole text again{reason}"


def _allocator_note(forecast: InferenceForecast) -> Iterator[str]:
    """A cache that grows by a token leaves gaps behind, which other segments than the default's close."""
    memory, expandable = forecast.memory, forecast.expandable_bytes
    if expandable is not None and memory.process_bytes is not None and expandable < 0.9 * memory.process_bytes:
        yield (
            f"a growing cache fragments the allocator: with PYTORCH_ALLOC_CONF=expandable_segments:True the process needs "
            f"{format_bytes(expandable)}"
        )


def _does_not_fit(
    job: Job,
    source: ModelSource,
    machine: Machine,
    request: Request,
    forecaster: InferenceForecaster,
    forecast: InferenceForecast,
) -> DoesNotFit:
    """The error, with single changes that would make it fit."""
    helps, memory = [], forecast.memory
    assert memory.peak is not None, "it was traced"
    if memory.peak.by_kind["weights"] + memory.baseline_bytes < memory.available_bytes:
        batch = _largest_batch(forecaster, job, request, request.batch) if request.batch > 1 else 0
        prompt = _longest_prompt(forecaster, request, request.prompt)
        helps += [f"inference.batch={batch}"] if batch else []
        helps += [f"inference.prompt={prompt}"] if prompt else []
    for mode in ("int8", "nf4") if job.quantise is None else ():
        changed = dataclasses.replace(job, quantise=QuantiseJob(mode=mode))
        other = _forecaster(changed, source, machine).forecast(request).memory
        if other.verdict in ("fits", "tight") and other.process_bytes is not None:
            helps.append(f"quantise={mode} ({format_bytes(other.process_bytes)})")
    return DoesNotFit(
        f"this does not fit on {machine.elsewhere or machine.device.torch_name}: it {memory.reason}",
        why=f"{request.batch} x ({request.prompt:,} + {request.answer:,}) tokens with {_dtype_name(job, source, machine)} weights"
        + (f" in {job.quantise.mode}" if job.quantise else ""),
        remedy="; or ".join(helps) or "a smaller model, or a device with more memory: nothing that was tried alone is enough",
    )
