"""Trace the user's real step on fake tensors: no weights, no device, no memory; every allocation seen.

The model is built on the meta device (PEFT cannot swap parameters of fake tensors), its parameters are made anew as fake
ones, and two optimizer steps run: the second is the peak, because by then the optimizer's state exists.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from sartor.data.pack import Batch
from sartor.model.regions import Reduction
from sartor.predict.experts import even_experts
from sartor.predict.ledger import OUTSIDE, PAGED, Ledger
from sartor.predict.results import fake_mode
from sartor.predict.target import Target
from sartor.predict.tracker import StorageTracker
from sartor.predict.world import wrappers_watched
from sartor.step import TensorBatch, TrainStep

if TYPE_CHECKING:
    from sartor.parallel.pipeline import PipelineStep

PASSES = "forward and backward"
"""Name of the phase in which gradients are computed."""


def trace_steps(
    model: nn.Module,
    make_step: Callable[[nn.Module], TrainStep | PipelineStep],
    batches: Sequence[Batch],
    *,
    later: Sequence[Batch] | None = None,
    target: Target | None = None,
    reduction: Reduction | None = None,
) -> Ledger:
    """Two training steps of a model that lives on the meta device, each over these micro-batches; the second one over `later`,
    where that is given, and where it is empty there is none.

    `make_step` builds the same step that the run will use. With a `reduction` the events carry their units' tags.
    """
    packed = any(_has_borders(batch) for batch in (*batches, *(later or ())))
    tracker = StorageTracker(packed=packed, target=target)
    sharded = any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
    resizes = wrappers_watched(tracker) if sharded else contextlib.nullcontext()
    with (
        _quiet_logs(),
        fake_mode(),
        _values_allowed(),
        resizes,
        tracker,
        tracker.functions_noted(),
    ):
        if sharded:
            model.to_empty(device="cpu")
        else:
            _materialise(model)
        tracker.mark([*model.parameters(), *model.buffers()], "weights")
        if reduction is not None:
            _tag_weights(tracker, model, reduction)
        tracker.follow(model, reduction)
        step = make_step(model)
        passed = run_traced_step(tracker, step, batches, _trained(batches), shorten=True)
        if later is None or later is batches:
            repeat_traced_step(tracker, step, batches, _trained(batches), passed)
        elif later:
            run_traced_step(tracker, step, later, _trained(later), number=1, shorten=True)
        tracker.close()
    return tracker.ledger


def _trained(batches: Sequence[Batch]) -> int:
    return max(sum(batch.trained_tokens for batch in batches), 1)


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What the passes of a traced step gave."""

    gradients: dict[str, int]
    """Parameter → serial number of its gradient."""
    shared: dict[str, torch.Tensor]
    """The gradients themselves, where some share a storage (those of a group of FSDP2's do)."""


def run_traced_step(
    tracker: StorageTracker,
    step: TrainStep | PipelineStep,
    batches: Sequence[Batch],
    trained_tokens: int,
    *,
    number: int = 0,
    device: str = "cpu",
    shorten: bool = False,
) -> Passed:
    """One step under the tracker, its phases and kinds named. `shorten`: of micro-batches that are alike one runs, and its events
    are repeated."""
    tracker.begin(f"step {number + 1}: {PASSES}")
    on_device = [TensorBatch.of(batch, device) for batch in batches]
    if shorten and isinstance(step, TrainStep) and _alike(step, batches):
        _accumulate_alike(tracker, step, on_device, trained_tokens)
    else:
        step.accumulate(on_device, trained_tokens)
    gradients = {name: p.grad for name, p in step.parameters.items() if p.grad is not None}
    serials = {name: tracker.see(gradient) for name, gradient in gradients.items()}
    tracker.ledger.kinds.update(dict.fromkeys(serials.values(), "gradients"))
    shared = {} if len(set(serials.values())) == len(serials) else gradients
    del gradients
    _clip_and_update(tracker, step, number=number)
    tracker.forget(shared.values())  # the step has let go of them
    return Passed(gradients=serials, shared=shared)


def _alike(step: TrainStep, batches: Sequence[Batch]) -> bool:
    """Whether what a step does for its micro-batches is the same each time, once gradients are there. Not so in a pipeline, where
    several are under way, and not under FSDP2, whose first pass sets things up."""
    if len(batches) < 2 or any(batch is not batches[0] for batch in batches):
        return False
    return not _is_wrapped(step.model)


def _is_wrapped(model: nn.Module) -> bool:
    """Whether FSDP2 wraps it."""
    return any(type(module).__name__.startswith("FSDP") for module in model.modules())


def _accumulate_alike(tracker: StorageTracker, step: TrainStep, on_device: Sequence[TensorBatch], trained_tokens: int) -> None:
    """The first micro-batch runs; the others are its events over again, their gradients gone as soon as they are added."""
    added: dict[str, int] = {}

    def note(name: str) -> None:
        added.setdefault(name, len(tracker.ledger.events))

    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: note(name))
        for name, parameter in step.parameters.items()
    ]
    before, start = tracker.alive(), len(tracker.ledger.events)
    losses = step.accumulate(on_device[:1], trained_tokens, several=True)
    for hook in hooks:
        hook.remove()
    gradients = {tracker.see(p.grad): added.get(name, 0) for name, p in step.parameters.items() if p.grad is not None}
    gradients = {serial: when for serial, when in gradients.items() if serial not in before}  # some lie where they always do
    expected = before | set(gradients) | {tracker.see(loss) for loss in losses}
    if tracker.alive() != expected or not all(gradients.values()):
        step.accumulate(on_device[1:], trained_tokens, several=True)
        return
    end = len(tracker.ledger.events)
    left: list[int] = []
    for _ in on_device[1:]:
        left += tracker.repeat_micro_batch(start, end, gradients)
    del losses
    tracker.release(left)


def repeat_traced_step(
    tracker: StorageTracker,
    step: TrainStep | PipelineStep,
    batches: Sequence[Batch],
    trained_tokens: int,
    passed: Passed,
) -> None:
    """A second step: its passes are the first one's over again; clipping and update run, on gradients that take their place."""
    if _happened_once(tracker.ledger):
        run_traced_step(tracker, step, batches, trained_tokens, number=1)
        return
    copies = tracker.repeat(f"step 1: {PASSES}", f"step 2: {PASSES}")
    for name, serial in passed.gradients.items():
        parameter = step.parameters[name]
        if passed.shared:  # those of the first step once more: no others can be laid out like them
            parameter.grad = passed.shared.pop(name)
            if serial in copies:
                tracker.adopt(parameter.grad, copies.pop(serial))
            continue
        with tracker.unseen():
            dtype = parameter.grad_dtype
            parameter.grad = torch.empty_like(parameter, dtype=None if dtype == parameter.dtype else dtype)
        tracker.adopt(parameter.grad, copies.pop(serial))
    _clip_and_update(tracker, step, number=1)
    tracker.release(copies.values())


def _happened_once(ledger: Ledger) -> bool:
    """Whether the first step's passes did what a second step's do not: left something alive when the step was over (outputs that
    are held, a bias in another format for good), or freed what was there before."""
    made: set[int] = set()
    freed: set[int] = set()
    early: set[int] = set()
    for event in ledger.events:
        passes = event.phase == f"step 1: {PASSES}"
        if event.size_bytes < 0:
            freed.add(event.storage)
            if passes and event.storage not in made:
                early.add(event.storage)
        elif passes and event.size_bytes:
            made.add(event.storage)
    return bool(early or made - freed)


def _clip_and_update(tracker: StorageTracker, step: TrainStep | PipelineStep, *, number: int) -> None:
    tracker.begin(f"step {number + 1}: clip", by_parameter=True)
    step.clip()
    tracker.begin(f"step {number + 1}: update", by_parameter=True)
    step.update(1e-4)
    for parameter, state in step.optimizer.state.items():
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        tracker.mark(tensors, "optimizer")
        tracker.mark([tensor for tensor in tensors if getattr(tensor, "is_paged", False)], PAGED)
        for tensor in tensors:
            tracker.belongs(tensor, tracker.unit_of(parameter))


def _tag_weights(tracker: StorageTracker, model: nn.Module, reduction: Reduction) -> None:
    tags = reduction.tags()
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tracker.belongs(tensor, tags.get(id(module), OUTSIDE))


def _materialise(model: nn.Module) -> None:
    """Replace meta parameters and buffers by fake CPU ones, keeping ties and what trains."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = fake(parameter)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """What cannot be traced is said once, in the forecast, not in a log as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _values_allowed() -> Iterator[None]:
    """Let transformers take the branch of a real run, not the one it keeps for tracers, when it builds attention masks; experts
    that look at values do without."""
    from transformers import masking_utils

    original = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        with even_experts():
            yield
    finally:
        masking_utils.is_tracing = original


def _has_borders(batch: Batch) -> bool:
    """Whether some row holds several segments: positions that do not simply go on (padding is a segment too)."""
    return batch.position_ids_RT is not None and bool((np.diff(batch.position_ids_RT, axis=1) != 1).any())
