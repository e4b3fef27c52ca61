"""Make a plan: resolve what the job leaves open, find the worst batch, trace it, and choose the first strategy that fits."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from sartor.data import prepare
from sartor.errors import JobError
from sartor.job import Job
from sartor.kernels.attention import NAME as SEGMENTS
from sartor.machine import Machine, probe
from sartor.methods import MethodTraits, traits
from sartor.model import ModelSource, check_trainable, choosable_blocks, dissect, load_tokenizer, outline, resolve
from sartor.plan.attention import choose_attention
from sartor.plan.changes import does_not_fit, more_room
from sartor.plan.placed import Shortfall
from sartor.plan.placed_time import place_fastest
from sartor.plan.plan import Plan
from sartor.plan.prepack import prepack_note, search_for, wants_prepack, with_prepack
from sartor.plan.products import frozen_products
from sartor.plan.search import Choice
from sartor.plan.setting import Setting, batch_order
from sartor.plan.strategy import Strategy
from sartor.predict import MemoryForecast, count_trained
from sartor.predict.allocator_setting import expandable_segments
from sartor.predict.time import TimeForecast
from sartor.step import FAST_BF16, Precision, cannot_pack, cannot_share_prefixes
from sartor.step.blockwise import check_optimizer, is_blockwise

LONGEST_DEFAULT = 2048
"""Tokens of `data.max_length` where the job leaves it open and the model allows more."""


def make(job: Job, machine: Machine | None = None) -> Plan:
    """The plan of `job` on `machine` (this one by default). Needs no weights and no accelerator.

    Raises UsageError of the room concerned: JobError, ModelError, DataError, or DoesNotFit.
    """
    machine = machine or probe(job.machine)
    source = resolve(job.model)
    check_trainable(source)
    method = traits(job)
    inexact = frozen_products(job, machine)
    _check_optimizer(job, machine)
    instructions, optimizer = machine.instruction_sets, job.training.optimizer
    precision = Precision.resolve(job.precision, machine.device.kind, instruction_sets=instructions, optimizer=optimizer)
    model = outline(source, dtype=precision.load_dtype(adapter=method.adapter))
    anatomy = dissect(model)
    attention, attention_note = choose_attention(job, method, source, machine)
    packing, note = _packing(job, method, model, dense=machine.device.kind == "cpu" and attention != SEGMENTS)
    if job.strategy.share_prefixes:
        _check_prefixes(
            job, model, packing=packing, segments=attention == SEGMENTS, attention_note=attention_note, packing_note=note
        )
    job, longest = _resolved(job, source, method)
    tokenizer = None if job.data.synthetic else load_tokenizer(job.model)
    sets = prepare(job, tokenizer, max_length=longest, vocab_size=source.vocab_size)
    order = batch_order(job, sets)
    setting = Setting(
        job=with_prepack(job, wants_prepack(job, machine, method, precision, model)),
        source=source,
        machine=machine,
        method=method,
        precision=precision,
        packing=packing,
        sets=sets,
        order=order,
        expandable_segments=expandable_segments(
            job.strategy.expandable_segments, machine.device.kind, here=not machine.elsewhere
        ),
        attention=attention,
        blocks=choosable_blocks(model) if method.recompute else 0,
    )
    setting, choice = search_for(job, setting, longest)
    strategy, forecast, time, shortfall = _placed(setting, choice)
    if forecast.verdict == "does not fit":
        raise does_not_fit(setting, strategy, forecast, shortfall, choice.missing)
    said = attention_note, note, _why_masters(job, precision, machine), inexact, prepack_note(strategy, model)
    notes = (*said, choice.note, forecast.drift_note, more_room(setting, strategy, forecast))
    return Plan(
        job=job,
        machine=machine,
        strategy=strategy,
        forecast=forecast,
        traits=method,
        anatomy=anatomy,
        trained_parameters=count_trained(job, source, precision),
        data=sets.summary,
        total_steps=order.total_steps,
        time=time,
        rejected=choice.rejected,
        notes=tuple(filter(None, notes)),
    )


def _check_optimizer(job: Job, machine: Machine) -> None:
    """Raises JobError where the job's optimizer is not for this machine, or for what else the job asks for."""
    name, wanted = job.training.optimizer, job.strategy
    stages = wanted.pipeline == machine.devices  # each of which holds whole tensors
    processes = 1 if wanted.processes == "auto" else wanted.processes
    check_optimizer(name, machine.device.kind, devices=1 if stages else machine.devices, processes=processes)
    if job.precision.rounding == "stochastic" and processes > 1:
        raise JobError(
            f"`precision.rounding` is stochastic, and `strategy.processes` is {processes}",
            why="processes update shares of a parameter, and chance is drawn for whole ones",
            remedy="strategy.processes=1, or precision.rounding=nearest",
        )
    if is_blockwise(name) and machine.device.kind != "cpu" and wanted.placement == "disk":
        raise JobError(
            f"`strategy.placement` is disk, and `training.optimizer` is {name}",
            why="it updates what is in memory only",
            remedy="training.optimizer=adamw, or strategy.placement=device",
        )


def _placed(setting: Setting, choice: Choice) -> tuple[Strategy, MemoryForecast, TimeForecast | None, Shortfall | None]:
    """What the search found, with some of it on disk where the job wants that, or where nothing else fits."""
    wanted = setting.job.strategy.placement
    asked = choice.forecast.process_bytes is not None and (
        wanted == "disk" or (wanted == "auto" and choice.forecast.verdict == "does not fit")
    )
    if not asked or setting.machine.device.kind != "cpu":  # where the search has looked for it
        return choice.strategy, choice.forecast, choice.time, None
    strategy = dataclasses.replace(choice.strategy, recomputed=None)  # all blocks, where some are recomputed
    time = choice.time if strategy == choice.strategy else None
    found = place_fastest(setting, strategy, choice.forecast, time)
    return (*found, None) if isinstance(found, tuple) else (choice.strategy, choice.forecast, choice.time, found)


def _resolved(job: Job, source: ModelSource, method: MethodTraits) -> tuple[Job, int]:
    """The job with what model and method decide filled in (length, rate), and that length."""
    longest = max_length(job, source, method)
    data = dataclasses.replace(job.data, max_length=longest)
    training = dataclasses.replace(job.training, learning_rate=method.learning_rate)
    return dataclasses.replace(job, data=data, training=training), longest


def max_length(job: Job, source: ModelSource, method: MethodTraits) -> int:
    """The longest sequence in tokens: the job's wish, or what model and method leave. Raises JobError."""
    limit, wish, virtual = source.max_positions, job.data.max_length, method.virtual_tokens
    if wish is None and job.data.synthetic:
        wish = job.data.synthetic.length
    if limit is None:
        return wish or LONGEST_DEFAULT
    room = limit - virtual
    if room < 2:
        raise JobError(f"{virtual} virtual tokens leave no room in the model's {limit} positions", remedy="fewer virtual tokens")
    if wish is not None and wish > room:
        taken = f", {virtual} of them virtual tokens" if virtual else ""
        raise JobError(
            f"`data.max_length` is {wish}, the model has {limit} positions{taken}", remedy=f"at most data.max_length={room}"
        )
    return wish or min(room, LONGEST_DEFAULT)


def _packing(job: Job, method: MethodTraits, model: nn.Module, *, dense: bool) -> tuple[bool, str]:
    """Whether rows are packed, and what is said where they are not. `dense`: a packed row would mean a dense mask on a CPU."""
    wanted = job.data.packing
    if wanted is False:
        return False, ""
    if job.strategy.context > 1:
        reason = "ring attention (strategy.context) knows the plain causal mask only, and packed rows need another"
    elif not method.packing:
        reason = f"method {job.method} puts virtual tokens before a row, so a row holds one example"
    else:
        reason = cannot_pack(model)
    if reason and wanted is True:
        raise JobError("`data.packing` is true, but this job cannot be packed", why=reason, remedy="data.packing=auto, or false")
    if dense and not reason and wanted == "auto":
        reason = "on a CPU, attention with a dense mask costs more than padding does (data.packing=true packs nevertheless)"
    return not reason, f"not packed: {reason}" if reason else ""


def _check_prefixes(job: Job, model: nn.Module, *, packing: bool, segments: bool, attention_note: str, packing_note: str) -> None:
    """Raises JobError where examples cannot share the computation of what they begin with."""
    if not segments:
        why = attention_note or "it needs attention by segments, on a CPU"
    elif not packing:
        why = packing_note or "a row holds one example (data.packing is false)"
    elif job.lora.dropout > 0 and job.method in ("lora", "qlora"):
        why = "dropout (lora.dropout) would be the same for all that share a beginning"
    else:
        why = cannot_share_prefixes(model)
    if why:
        raise JobError(
            "`strategy.share_prefixes` is true, which this job cannot have", why=why, remedy="strategy.share_prefixes=false"
        )


def _why_masters(job: Job, precision: Precision, machine: Machine) -> str:
    """Why the arithmetic is in bfloat16 on a CPU, where the job left it open."""
    if job.precision.mode != "auto" or not precision.masters:
        return ""
    has = next(name for name in FAST_BF16 if name in machine.instruction_sets)
    return (
        f"bf16-master: this CPU multiplies bfloat16 fast ({has}); what trains keeps all bits of float32, in two halves "
        "(precision=float32 for float32 arithmetic)"
    )


def load_dtype(plan: Plan) -> torch.dtype:
    """Format in which the plan loads the base model."""
    return plan.strategy.precision.load_dtype(adapter=plan.traits.adapter)
