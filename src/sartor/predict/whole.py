"""The ledger of a job's whole model, traced on as few of its layers as the job allows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from sartor.data.pack import Batch
from sartor.job.schema import Job
from sartor.methods import trained_parameters, traits
from sartor.methods.adapters import peft_config
from sartor.model import ModelSource, choose_recomputed, short_skeleton, skeleton
from sartor.model.regions import EDGE, Reduction, every_layer, reduce_depth
from sartor.parallel import Layout, parallelise
from sartor.parallel.context import check_job, fullest_rank, ring_attention, share
from sartor.predict.ledger import Ledger
from sartor.predict.repeat import NotRepeatable, expand
from sartor.predict.target import Target
from sartor.predict.trace import trace_steps
from sartor.predict.world import fake_world
from sartor.step import Precision, TrainStep, first_of, make_step, make_trainable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern")
_LAYER_LISTS = ("layers_to_transform", "layers_pattern", "layer_replication", "trainable_token_indices")


Traces = dict[tuple[Any, ...], Ledger]
"""Shortened traces that differ in how many blocks recompute, by their pattern (`Reduction.pattern`)."""


def trace_job(
    job: Job,
    source: ModelSource,
    batches: Sequence[Batch],
    target: Target,
    *,
    precision: Precision,
    recompute: bool,
    attention: str | None,
    layout: Layout | None = None,
    later: Sequence[Batch] | None = None,
    context_rank: int | None = None,
    processes: int = 1,
    sketch: bool = False,
    recomputed: int | None = None,
    known: Traces | None = None,
    layers: bool = False,
) -> Ledger:
    """Two steps of the job over these micro-batches, the second one over `later`, as in `trace_steps`.

    Layers that repeat are traced a few times and repeated; where that cannot be (their traces differ, or the method treats layers
    by their number), the whole model is traced. Over several devices the ledger is that of rank 0, which holds the largest part
    where parts differ; where ranks share the tokens, that of the one with most to predict (or of `context_rank`). Of several
    `processes` on a CPU it is that of the first, whose part of the steps the micro-batches are. A `sketch` keeps fewer layers:
    sums are right, but which storage of a neighbour is freed when may not be. `recomputed`: blocks that recompute, the first
    ones; None: all, where `recompute` is set. `known`: shortened traces of the same step with other numbers of them, which differ
    only in how often blocks are repeated. `layers`: those that are not repeated are units of the ledger as well."""
    layout, rank = layout or Layout(), 0
    reduce_once = layout.zero == 1 and layout.wrapped
    if layout.context > 1:
        check_job(job)
        own = fullest_rank((later or batches)[0], layout.context) if context_rank is None else context_rank
        rank, batches, later = own * layout.tensor, *_shared_tokens(batches, later, own, layout.context)
    if layout.wrapped:
        layout, precision = dataclasses.replace(layout, gather=precision.compute), precision.gathered()

    def step_of(fake: nn.Module) -> TrainStep:
        return first_of(make_step(fake, job, precision, device_kind="cpu", reduce_once=reduce_once, kind=target.kind), processes)

    def traced(mesh: DeviceMesh | None, *, shortened: bool) -> Ledger:
        ring = ring_attention(mesh, layout) if mesh is not None and layout.context > 1 else contextlib.nullcontext()
        build = {"dtype": precision.load_dtype(adapter=traits(job).adapter), "attention": attention}
        model, reduction = _reduced(source, build, shortened, edge=1 if sketch else EDGE, layers=layers, recomputed=recomputed)
        if known is not None and reduction.regions and reduction.pattern in known:
            return expand(known[reduction.pattern], reduction).set_paged_apart()
        model = make_trainable(model, job, precision, recompute=recompute, meta=True, kind=target.kind)
        if mesh is not None:
            parallelise(model, mesh, layout)
        with ring:
            ledger = trace_steps(model, step_of, batches, later=later, target=target, reduction=reduction)
        if known is not None and reduction.regions:
            known[reduction.pattern] = ledger
        return expand(ledger, reduction).set_paged_apart()

    with fake_world(layout, rank=rank) as mesh, target.rules():
        try:
            return traced(mesh, shortened=treats_layers_alike(job))
        except NotRepeatable:
            return traced(mesh, shortened=False)


def _reduced(
    source: ModelSource, build: dict[str, Any], shortened: bool, *, edge: int, layers: bool, recomputed: int | None
) -> tuple[nn.Module, Reduction]:
    """What of a model is traced, and what its units are."""
    if shortened and recomputed is None:
        return short_skeleton(source, edge=edge, singles=layers, **build)
    model = skeleton(source, **build)
    choose_recomputed(model, recomputed)
    if shortened:
        return model, reduce_depth(model, edge=edge, singles=layers)
    return model, every_layer(model) if layers else Reduction()


def _shared_tokens(
    batches: Sequence[Batch], later: Sequence[Batch] | None, rank: int, ranks: int
) -> tuple[list[Batch], list[Batch] | None]:
    """A context parallel rank's part of the micro-batches; what was the same batch stays the same."""
    own: dict[int, Batch] = {}

    def part(whole: Sequence[Batch]) -> list[Batch]:
        return [own[id(batch)] if id(batch) in own else own.setdefault(id(batch), share(batch, rank, ranks)) for batch in whole]

    first = part(batches)
    if later is None or later is batches:
        return first, first
    return first, part(later)


def count_trained(job: Job, source: ModelSource, precision: Precision) -> int:
    """Parameters that the job trains, of the whole model."""
    dtype = precision.load_dtype(adapter=traits(job).adapter)
    model, reduction = (
        short_skeleton(source, dtype=dtype) if treats_layers_alike(job) else (skeleton(source, dtype=dtype), Reduction())
    )
    model = make_trainable(model, job, precision, recompute=False, meta=True)
    if not reduction.regions:
        return sum(parameter.numel() for parameter in trained_parameters(model).values())
    return reduction.count_parameters(model, trained=True)


def treats_layers_alike(job: Job) -> bool:
    """Whether the method does the same in every layer: no prefix (one tensor for all layers), no layer named by its number."""
    if job.method == "full":
        return True
    config = peft_config(job, meta=True)
    if config.is_prompt_learning:
        return "PREFIX" not in str(config.peft_type)
    if any(getattr(config, name, None) for name in _LAYER_LISTS):
        return False
    return not any(_has_digits(getattr(config, name, None)) for name in _PATTERNS)


def _has_digits(value: Any) -> bool:
    if isinstance(value, str):
        return value != "all-linear" and (
            any(letter.isdigit() for letter in value) or any(letter in value for letter in "*[]()^$")
        )
    if isinstance(value, dict):
        return any(_has_digits(key) for key in value)
    if isinstance(value, list | tuple | set):
        return any(_has_digits(item) for item in value)
    return False
