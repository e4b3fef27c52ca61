"""Pipeline stages: a decoder cut between its layers, and the training step of one stage.

PyTorch's `torch.distributed.pipelining` sends, receives and schedules (GPipe: Huang et al. 2019, arXiv 1811.06965; 1F1B:
Narayanan et al. 2019, PipeDream, and 2021, arXiv 2104.04473). All micro-batches of a step have one shape, as its buffers have.

Shapes: R rows, T positions, K positions that are kept for the head, H hidden width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sartor.data.pack import IGNORE, Batch
from sartor.errors import JobError
from sartor.model import dissect
from sartor.model.regions import keep_layers
from sartor.parallel.layout import Layout
from sartor.parallel.styles import TOKENS
from sartor.step import Precision, TensorBatch, TrainStep

WHOLE = "strategy.pipeline=1"


def layers_of_stages(layers: int, stages: int) -> list[range]:
    """Which layers each stage has: an even share of consecutive ones, one more on the first stages where there is a rest.

    Raises JobError.
    """
    if stages > layers:
        raise JobError(
            f"{stages} pipeline stages for {layers} layers",
            why="every stage needs a layer at least",
            remedy=f"strategy.pipeline={layers} or less",
        )
    share, rest = divmod(layers, stages)
    starts = [index * share + min(index, rest) for index in range(stages + 1)]
    return [range(first, end) for first, end in itertools.pairwise(starts)]


def cut(model: nn.Module, index: int, stages: int) -> nn.Module:
    """Leave of `model` what stage `index` has, in place; return the module that holds the layers.

    The first stage keeps what comes before the layers (embeddings), the last what comes after (final norm, head). A head that
    shares the embeddings' weight has it on its stage, too. Raises JobError for models that cannot be cut.
    """
    stack, owner = _stack_and_owner(model)
    layers = owner.get_submodule(stack)
    assert isinstance(layers, nn.ModuleList | nn.Sequential)
    before = _before_layers(model, owner, layers)
    left_alone = {*layers.modules(), *(module for module in model.modules() if layers in set(module.modules()))}
    keep_layers(layers, getattr(owner, "config", None), layers_of_stages(len(layers), stages)[index])
    for path, module in list(model.named_modules()):
        if module in left_alone or not list(module.parameters(recurse=False)):
            continue
        if index > 0 if module in before else index < stages - 1:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Identity())
    _stack_and_owner(model)  # layers of several classes may no longer be told from what is around them
    return owner


def _stack_and_owner(model: nn.Module) -> tuple[str, nn.Module]:
    stacks = dissect(model).stacks
    if len(stacks) != 1:
        raise JobError(
            f"{type(model).__name__} cannot be cut into pipeline stages",
            why=f"it has {len(stacks)} stacks of layers",
            remedy=WHOLE,
        )
    path, _, name = stacks[0].path.rpartition(".")
    return name, model.get_submodule(path)


class _Arrived(Exception):
    """The first layer was called."""


class _OneSegment(TorchDispatchMode):
    """Answers the one question that models ask of values before their first layer, which the meta device cannot: is each row
    one segment?"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def _before_layers(model: nn.Module, owner: nn.Module, layers: nn.Module) -> set[nn.Module]:
    """Modules that run before the first layer; that nothing but the embeddings happens there to what later stages get in their
    place is checked."""
    ran: list[nn.Module] = []
    arrived: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        arrived.append(args[0] if args else options["hidden_states"])
        raise _Arrived

    hooks = [module.register_forward_pre_hook(lambda module, _: ran.append(module)) for module in model.modules()]
    hooks.append(next(layers.children()).register_forward_pre_hook(stop, with_kwargs=True))
    try:
        _run_until_layers(owner, input_ids=torch.zeros(1, 4, dtype=torch.int64, device=next(model.parameters()).device))
        before = set(ran)
        hidden_RTH = torch.empty_like(arrived[0])
        _run_until_layers(owner, inputs_embeds=hidden_RTH)
    except Exception as error:
        why = str(error).strip().partition("\n")[0]
        raise JobError(f"{type(model).__name__} cannot be cut into pipeline stages", why=why, remedy=WHOLE) from error
    finally:
        for hook in hooks:
            hook.remove()
    if arrived[1] is not hidden_RTH:
        raise JobError(
            f"{type(model).__name__} cannot be cut into pipeline stages",
            why="between its embeddings and its first layer it does something that every stage would repeat",
            remedy=WHOLE,
        )
    return before


def _run_until_layers(owner: nn.Module, **inputs: Tensor) -> None:
    try:
        with _OneSegment():  # type: ignore[no-untyped-call]
            owner(**inputs, use_cache=False)
    except _Arrived:
        return
    raise ValueError("its layers are not called by the module that holds them")


class Stage(nn.Module):
    """A stage as PyTorch's pipeline runs it. In: token ids on the first stage, hidden states elsewhere; out: logits of the kept
    positions on the last stage, hidden states elsewhere."""

    def __init__(
        self, model: nn.Module, owner: nn.Module, index: int, stages: int, *, precision: Precision, device_kind: str
    ) -> None:
        super().__init__()
        self.model, self.index, self.stages = model, index, stages
        self._owner = next(path for path, module in self.named_modules() if module is owner)
        self._precision, self._device_kind = precision, device_kind
        self._sharing: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.stages - 1

    def share_tokens(self, mesh: DeviceMesh) -> None:
        """Between stages, hidden states are split over the tokens: a tensor parallel rank gets and sends its own only, of rows
        that divide by the ranks."""
        self._sharing = mesh

    def forward(self, given: Tensor, *, position_ids_RT: Tensor | None = None, kept_K: Tensor | None = None) -> Tensor:
        """`given`: ids [R, T] or hidden states [R, T, H]; the result is [R, K, V] or [R, T, H]."""
        if self._sharing is not None and not self.is_first:
            given = DTensor.from_local(given, self._sharing, [TOKENS], run_check=False)
        inputs: dict[str, Any] = {"input_ids" if self.is_first else "inputs_embeds": given, "use_cache": False}
        if position_ids_RT is not None:
            inputs["position_ids"] = position_ids_RT
        with self._precision.autocast(self._device_kind):
            if not self.is_last:
                hidden_RTH: Tensor = self.get_submodule(self._owner)(**inputs).last_hidden_state
                return hidden_RTH.to_local() if isinstance(hidden_RTH, DTensor) else hidden_RTH
            logits_RKV: Tensor = self.model(**inputs, logits_to_keep=kept_K).logits
            return logits_RKV


class PipelineStep:
    """One optimizer step of a stage: what `TrainStep` is for a whole model, its passes in the order of PyTorch's schedule.

    Clipping and update are the step's own, over the stage's parameters.
    """

    def __init__(self, stage: Stage, step: TrainStep, *, layout: Layout, micro_batches: int, group: ProcessGroup | None) -> None:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        check_schedule(layout, micro_batches)
        self._stage, self._step, self._trained_tokens = stage, step, 1
        self.parameters, self.optimizer = step.parameters, step.optimizer
        self.pipeline_stage = PipelineStage(stage, stage.index, stage.stages, next(stage.parameters()).device, group=group)
        self.schedule = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[layout.schedule](
            self.pipeline_stage, micro_batches, loss_fn=self._loss, scale_grads=False
        )

    def prepare(self, batch: TensorBatch) -> None:
        """Agree with the neighbours on shapes and allocate what they send, for every micro-batch. The first step does it
        where this was not called."""
        self.pipeline_stage.has_backward = True
        arguments, options, targets = self._split([batch])
        self.schedule._initialize_stage(arguments[0], options[0], targets[0])

    def accumulate(self, batches: Sequence[TensorBatch], trained_tokens: int) -> list[Tensor]:
        """Forward and backward passes; on the last stage, the summed loss of every micro-batch."""
        self._trained_tokens = trained_tokens
        arguments, options, targets = self._split(batches)
        losses: list[Tensor] = []
        # What `schedule.step` does, but for its splitting of one large batch: kept positions differ between micro-batches.
        self.pipeline_stage.has_backward = True
        self.pipeline_stage.clear_runtime_states()
        self.schedule._step_microbatches(arguments, options, targets, losses, return_outputs=False)
        return [loss.detach() * trained_tokens for loss in losses]

    def clip(self) -> Tensor:
        """Clip the gradient; its norm before."""
        return self._step.clip()

    def update(self, rate: float) -> None:
        """Take the optimizer step at this learning rate and free the gradients."""
        self._step.update(rate)

    def _split(self, batches: Sequence[TensorBatch]) -> tuple[list[Any], list[dict[str, Tensor]], list[Tensor]]:
        arguments = [(batch.input_ids_RT,) if self._stage.is_first else () for batch in batches]
        options = [{} if batch.position_ids_RT is None else {"position_ids_RT": batch.position_ids_RT} for batch in batches]
        if self._stage.is_last:
            options = [{**given, "kept_K": batch.kept_K} for given, batch in zip(options, batches, strict=True)]
        return arguments, options, [batch.targets_RT[:, batch.kept_K] for batch in batches]

    def _loss(self, logits_RKV: Tensor, targets_RK: Tensor) -> Tensor:
        """`sartor.step.SumLoss`, divided by the step's trained tokens."""
        logits_RKV = logits_RKV.float()
        loss = F.cross_entropy(logits_RKV.flatten(0, 1), targets_RK.flatten(), ignore_index=IGNORE, reduction="sum")
        return loss / self._trained_tokens


def check_schedule(layout: Layout, micro_batches: int) -> None:
    """Raises JobError where the pipeline's schedule cannot run that many micro-batches."""
    if layout.schedule == "1f1b" and micro_batches < layout.pipeline:
        raise JobError(
            f"{micro_batches} micro-batches a step for {layout.pipeline} pipeline stages",
            why="1F1B keeps a micro-batch in flight for every stage",
            remedy="more micro-batches (a smaller strategy.micro_batch), fewer stages (strategy.pipeline), or the schedule gpipe",
        )


def of_one_shape(batches: Sequence[Batch], layout: Layout | None = None) -> list[Batch]:
    """The micro-batches padded to the most rows and the longest row: a pipeline's buffers have one shape. Where the layout splits
    the tokens, they divide by its ranks."""
    ranks = layout.tensor if layout is not None and layout.sequence else 1
    rows = max(batch.input_ids_RT.shape[0] for batch in batches)
    width = max(batch.input_ids_RT.shape[1] for batch in batches)
    width += -width % ranks
    return [_padded(batch, rows, width) for batch in batches]


def _padded(batch: Batch, rows: int, width: int) -> Batch:
    more = ((0, rows - batch.input_ids_RT.shape[0]), (0, width - batch.input_ids_RT.shape[1]))
    if more == ((0, 0), (0, 0)):
        return batch
    positions_RT = batch.position_ids_RT
    if positions_RT is not None:  # padding is a segment of its own
        positions_RT = np.pad(positions_RT, more)
        positions_RT[:, width - more[1][1] :] = np.arange(more[1][1])
        positions_RT[rows - more[0][1] :] = np.arange(width)
    return dataclasses.replace(
        batch,
        input_ids_RT=np.pad(batch.input_ids_RT, more),
        targets_RT=np.pad(batch.targets_RT, more, constant_values=IGNORE),
        position_ids_RT=positions_RT,
    )
