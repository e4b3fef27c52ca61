"""A training step on a placed model: the plain one, bit for bit, with its update streamed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from sartor.kernels.adam import MasterAdamW, norm_of_squares, square_sum
from sartor.placement.engine import Engine
from sartor.placement.gradients import AwayGradient
from sartor.placement.optimizer import StreamedOptimizer
from sartor.placement.streams import StreamMover
from sartor.placement.timeline import Timeline
from sartor.plan.table import Table
from sartor.step import TensorBatch, TrainStep

RECORDED = 2
"""Steps of which a timeline is made; the last of them is kept: from then on, they are alike."""


class PlacedStep(TrainStep):
    """`step`, with its model's rows where an engine puts them."""

    def __init__(self, step: TrainStep, engine: Engine) -> None:
        vars(self).update(vars(step))
        self.engine = engine
        self.streamed = StreamedOptimizer(engine, step.optimizer)
        self._coefficient: Tensor | None = None
        self._updating = False
        self._steps = 0
        self.timeline: Timeline | None = None
        """Of the second step; of the first one where there is no other."""
        if step.model is not engine.model:
            engine.follow(step.model)

    @property
    def updating(self) -> bool:
        """Whether weights are being changed, or were when an update failed, here or later on host cores."""
        return self._updating or self.streamed.torn

    @updating.setter
    def updating(self, value: bool) -> None:
        self._updating = value

    def accumulate(self, batches: Sequence[TensorBatch], trained_tokens: int, *, several: bool = False) -> list[Tensor]:
        if self._steps < RECORDED and not isinstance(self.engine.mover, StreamMover):  # whose host does not see what runs when
            self.engine.recorder.begin()
        return super().accumulate(batches, trained_tokens, several=several)

    def micro_batch(self, batch: TensorBatch, trained_tokens: int, *, last: bool) -> Tensor:
        self.engine.gradients.measure = self._norm_of if last else None
        loss = super().micro_batch(batch, trained_tokens, last=last)
        self.engine.gradients.measure = None
        return loss

    def clip(self) -> Tensor:
        """The norm, from those of the tensors, taken as each was complete. The update multiplies by what clipping asks for."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norms = [self._known_norm(gradient) for gradient in gradients]
        norm = self._total(gradients, norms)
        if self.clip_norm > 0:  # as torch.nn.utils.clip_grad_norm_ does it
            self._coefficient = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def _norm_of(self, gradient: Tensor) -> Tensor | float:
        """Of one gradient: a sum of squares where masters are kept, else its norm, both by what the plain step uses."""
        if isinstance(self.optimizer, MasterAdamW):
            return square_sum(gradient)
        norm: Tensor = torch._foreach_norm([gradient], 2.0)[0]
        return norm

    def _known_norm(self, gradient: Tensor) -> Tensor | float:
        if not isinstance(gradient, AwayGradient):
            return self._norm_of(gradient)
        if gradient.known_norm is None:
            gradient.visits.hold(gradient.home)
            gradient.known_norm = self._norm_of(gradient.held)
        return gradient.known_norm  # type: ignore[no-any-return]

    def _total(self, gradients: Sequence[Tensor], norms: Sequence[Tensor | float]) -> Tensor:
        if isinstance(self.optimizer, MasterAdamW):
            return norm_of_squares(norms, gradients[0].device if gradients else None)
        if not gradients:
            return torch.tensor(0.0)
        empty: list[Tensor | None] = [torch.empty(0, dtype=gradient.dtype, device=gradient.device) for gradient in gradients]
        groups = _group_tensors_by_device_and_dtype([empty], with_indices=True)  # in whose order PyTorch adds up
        order = [place for _, places in groups.values() for place in places]
        device = gradients[0].device
        total: Tensor = torch.linalg.vector_norm(torch.stack([torch.as_tensor(norms[n]).to(device) for n in order]), 2.0)
        return total

    def update(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        coefficient = None if self._coefficient is None else self._coefficient.cpu()
        self.updating = True
        self.streamed.step(functools.partial(_scale, coefficient), overlap=True)
        self.updating = False
        self._steps += 1
        self.timeline = self.engine.recorder.end(self._kept_bytes()) or self.timeline
        self.discard()

    def _kept_bytes(self) -> int:
        """Of weights, gradients and optimizer state that stay on the device."""
        moving = self.engine.moving
        moved = {
            kind: {id(p) for live in moving if getattr(live, kind) is not None for p in live.row.parameters.values()}
            for kind in ("weights", "gradients", "state")
        }
        moved["state"] |= {id(p) for live in moving if live.on_host for p in live.trained}
        total = sum(p.nbytes for p in self.model.parameters() if id(p) not in moved["weights"])
        for parameter in self.parameters.values():
            if id(parameter) not in moved["gradients"]:
                total += parameter.numel() * (parameter.grad_dtype or parameter.dtype).itemsize
            if id(parameter) not in moved["state"]:
                total += sum(value.nbytes for value in self.optimizer.state[parameter].values() if isinstance(value, Tensor))
        return total

    @property
    def can_go_on(self) -> bool:
        """Whether an update that failed can be taken up again where it stopped."""
        return self.updating and not self.streamed.torn

    def rearrange(self, table: Table, *, limit: int, update_limit: int) -> None:
        """Go on with less in memory; gradients are let go, but for those of an update that goes on."""
        goes_on = self.can_go_on
        if not goes_on:
            self.discard()
        self.engine.rearrange(table, limit=limit, update_limit=update_limit, keep_gradients=goes_on)
        self.streamed.rearranged()

    def discard(self) -> None:
        self._coefficient = None
        self.streamed.give_up()
        self.optimizer.zero_grad(set_to_none=True)
        self.engine.reset()


def _scale(coefficient: Tensor | None, gradients: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """What clipping asks for, of these gradients or of this optimizer's next step."""
    if isinstance(optimizer, MasterAdamW):
        optimizer.scale = coefficient
    elif coefficient is not None and gradients:
        torch._foreach_mul_(list(gradients), coefficient.to(gradients[0].device))
