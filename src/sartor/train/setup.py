"""Everything the loop needs, made from a plan: model, method, data, optimizer, step."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sartor.data import DataSets, TokenSet, prepare
from sartor.data.order import BatchOrder
from sartor.data.pack import Batch, fill_rows, shares, step_batches
from sartor.errors import JobError, RunError, UsageError
from sartor.job import to_mapping
from sartor.kernels import arena
from sartor.kernels.native import missing
from sartor.machine.heap import Reserve, give_back_large_blocks, keep_freed_memory
from sartor.machine.products import keep_few_products
from sartor.model import build, load_tokenizer, resolve
from sartor.model.quantise import check_loadable
from sartor.placement import PlacedStep
from sartor.placement.save import load_model
from sartor.plan import Plan, batch_order, load_dtype, with_prepack
from sartor.predict.allocator_setting import set_expandable_segments
from sartor.step import TrainStep, World, make_step, make_trainable, mixes_examples, share_step, splits_prefixes
from sartor.step.blockwise import check_installed
from sartor.train.checkpoint import restore_adapter
from sartor.train.placed import build_placed, head_present


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """The live objects of a run."""

    step: TrainStep
    tokenizer: Any
    sets: DataSets
    order: BatchOrder
    pad_id: int
    packing: bool
    world: World
    reserve: Reserve = field(default_factory=Reserve)
    """Given back when memory has run out, so that the next plan can be made."""

    def batches(self, plan: Plan, samples: TokenSet, indices: Any) -> list[Batch]:
        """This process's micro-batches of these examples, as the strategy cuts them."""
        strategy = plan.strategy
        return step_batches(
            samples,
            shares(indices, samples.lengths, self.world.size)[self.world.rank],
            capacity=strategy.row_capacity,
            packing=self.packing,
            micro_batch=strategy.micro_batch,
            pad_id=self.pad_id,
            joined=self.packing and strategy.joined,
            share=strategy.share_prefixes,
        )

    def expect(self, plan: Plan, samples: TokenSet, indices: Any) -> bool:
        """Get ready for a step of these examples together with other processes; whether one of all has several micro-batches.
        False where there are no others."""
        if self.step.shared is None:
            return False
        tokens = np.concatenate([samples[int(index)].input_ids for index in indices] + [[self.pad_id]])
        self.step.shared.expect(torch.as_tensor(np.unique(tokens), dtype=torch.int64))
        capacity, packing = plan.strategy.row_capacity, self.packing
        parts = shares(indices, samples.lengths, self.world.size)
        rows = [fill_rows(part, samples.lengths, capacity=capacity, packing=packing) for part in parts]
        return max(map(len, rows)) > plan.strategy.micro_batch


def set_up(plan: Plan, checkpoint: Path | None, say: Callable[[str], None], world: World) -> Workbench:
    """Build the run of `plan`; with a checkpoint of a full fine-tune, the model comes from there.

    Raises ModelError, DataError or JobError of the rooms below.
    """
    job, strategy = plan.job, plan.strategy
    torch.set_num_threads(strategy.threads)
    if torch.device(strategy.device).type == "cuda":
        set_expandable_segments(strategy.expandable_segments)
    else:
        keep_few_products()
        if strategy.placement is not None:
            give_back_large_blocks()
        else:
            _keep_memory(say)
    tokenizer = load_tokenizer(job.model)
    assert job.data.max_length is not None, "a plan's job is resolved"
    source = resolve(job.model)
    sets = prepare(job, tokenizer, max_length=job.data.max_length, vocab_size=source.vocab_size)
    if checkpoint is not None and not plan.traits.adapter:
        source = dataclasses.replace(source, path=str(checkpoint), has_weights=True, revision=None)
    seed, precision = job.training.seed, strategy.precision
    placed = None
    if strategy.placement is not None:
        placed = build_placed(plan, source, say)
        model = placed.model
    else:
        model = build(
            source, dtype=load_dtype(plan), device=strategy.device, attention=strategy.attention, seed=seed, quantise=job.quantise
        )
    packing = strategy.packing and _packs(plan, model, source.vocab_size, say)
    if strategy.share_prefixes:
        _check_prefixes(model, source.vocab_size)
    job = with_prepack(job, strategy.prepack)
    model = make_trainable(model, job, precision, recompute=strategy.recompute, seed=seed)
    with contextlib.nullcontext() if placed is None else head_present(placed):
        step = make_step(model, job, precision, device_kind=torch.device(strategy.device).type)
    if placed is not None:
        step = PlacedStep(step, placed)
    share_step(step, world)
    _say_what_is_slow(step, strategy.device, say)
    return Workbench(
        step=step,
        tokenizer=tokenizer,
        sets=sets,
        order=batch_order(job, sets),
        pad_id=pad_id(tokenizer),
        packing=packing,
        world=world,
    )


def _keep_memory(say: Callable[[str], None]) -> None:
    """What a step frees is there for the next one."""
    kept = keep_freed_memory()
    if arena.use():
        say("tensors have memory of their own, kept from step to step")
    elif kept:
        say("malloc keeps freed memory for the next step")


def _say_what_is_slow(step: TrainStep, device: str, say: Callable[[str], None]) -> None:
    """Where a CPU cannot have Sartor's own kernels."""
    if device != "cpu":
        return
    if step.loss.apart:
        say(f"head and loss are computed one after the other: {step.loss.apart}")
    if why := missing():
        say(f"loss, optimizer and element-wise work run on PyTorch's operators, slower than compiled: {why}")


def _packs(plan: Plan, model: nn.Module, vocab_size: int, say: Callable[[str], None]) -> bool:
    """Whether the real model keeps the examples of a row apart.

    Where it does not, rows hold one example each: the result is the same, and a micro-batch needs no more memory, since it has as
    many rows and none is longer. Raises JobError where packing was asked for.
    """
    mixed = mixes_examples(model, vocab_size)
    if not mixed:
        return True
    if plan.job.data.packing is True:
        raise JobError(
            "`data.packing` is true, but this model lets the examples of a row see each other",
            why=mixed,
            remedy="data.packing=auto",
        )
    say(f"not packed after all: {mixed}")
    return False


def _check_prefixes(model: nn.Module, vocab_size: int) -> None:
    """Raises JobError where the real model does not compute a beginning that examples share as it computes it in each."""
    if why := splits_prefixes(model, vocab_size):
        raise JobError(
            "`strategy.share_prefixes` is true, but this model cannot share them", why=why, remedy="strategy.share_prefixes=false"
        )


def adopt(plan: Plan, bench: Workbench, checkpoint: Path) -> None:
    """Give the live model the weights of a checkpoint of the same run."""
    if plan.traits.adapter:
        restore_adapter(checkpoint, bench.step.parameters)
        return
    if isinstance(bench.step, PlacedStep):
        load_model(bench.step, checkpoint)
        return
    source = dataclasses.replace(resolve(plan.job.model), path=str(checkpoint), has_weights=True, revision=None)
    other = build(source, dtype=load_dtype(plan), device=plan.strategy.device, attention=plan.strategy.attention)
    bench.step.model.load_state_dict(other.state_dict())


def pad_id(tokenizer: Any) -> int:
    """What fills the end of a row. Any token does: padding is never a target and no real token sees it."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def identity(plan: Plan, sets: DataSets) -> str:
    """Fingerprint of what decides the course of a run: the job, less where it is written and for how long, and the data."""
    tree = to_mapping(plan.job)
    for key in ("output", "evaluation", "machine"):
        del tree[key]
    for key in ("save_every", "keep_last", "keep_best", "tensorboard"):
        del tree["training"][key]
    for key in (
        "micro_batch",
        "recompute",
        "processes",
        "placement",
    ):  # which change how sums are rounded, and may be what stopped the run
        del tree["strategy"][key]
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode())
    digest.update(sets.train.lengths.tobytes())
    digest.update(sets.train.trained_counts.tobytes())
    if plan.strategy.precision.masters:  # which another processor would not choose by itself
        digest.update(plan.strategy.precision.mode.encode())
    return digest.hexdigest()


def check_identity(plan: Plan, sets: DataSets, stored: str) -> None:
    """Raises RunError where the job or its data is not the one that was stopped."""
    if identity(plan, sets) != stored:
        raise RunError(
            "this is not the run that was stopped",
            why="the job, its data, or the precision chosen for this processor has changed since, so it could not go on exactly",
            remedy="resume with the run's job.yaml and the precision of its plan.yaml, or start a new run with another `output`",
        )


def check_runnable(plan: Plan, world: World) -> None:
    """Raises UsageError for a plan made for another machine, RunError where there are other processes than the plan's."""
    if plan.machine.elsewhere:
        raise UsageError(
            f"this plan is for {plan.machine.elsewhere}, not for the machine you are on",
            remedy="`sartor plan` it here; train it there, or with machine=auto",
        )
    check_installed(plan.job.training.optimizer, plan.machine.device.kind)
    quantise = plan.job.quantise
    if quantise is not None:
        check_loadable(resolve(plan.job.model), quantise)
    halves = quantise is not None and quantise.mode == "nf4" and quantise.compute == "float16"
    if halves or plan.strategy.precision.needs_loss_scaling:
        raise UsageError(
            "float16 arithmetic is for planning only",
            why="its gradients underflow without loss scaling, which this version does not do",
            remedy="quantise.compute=bfloat16" if halves else "precision=bf16-mixed, or float32",
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if world.size != plan.strategy.processes or (world.size == 1 and launched > 1):
        raise RunError(
            f"started as one of {max(launched, world.size)} processes, and the plan is for {plan.strategy.processes}",
            why="all of them would write one folder",
            remedy="run it without torchrun, accelerate or srun -n; strategy.processes says how many Sartor starts itself",
        )
