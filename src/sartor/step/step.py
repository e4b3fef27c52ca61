"""One optimizer step, the same object for the forecast (on fake tensors) and for the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sartor.kernels import arena
from sartor.kernels.adam import MasterAdamW, gradient_norm
from sartor.model.blocks import KEEPS
from sartor.step.blockwise import put_state, state_of
from sartor.step.loss import SumLoss, TensorBatch
from sartor.step.precision import Precision
from sartor.step.processes import GradientSum, World, lookup_table
from sartor.step.shared import SharedGradients, can_share, memory_bytes, shared_memory


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What a step's forward and backward passes gave; tensors, so that nothing waits for the device."""

    losses: list[Tensor]
    """Summed loss of every micro-batch, float32 scalars."""
    norm: Tensor
    """Global norm of the gradient before clipping, a float32 scalar."""


class TrainStep:
    """Forward and backward over all micro-batches of a step, clipping, update."""

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        precision: Precision,
        device_kind: str,
        clip_norm: float,
        loss: str = "sartor",
        reduce_once: bool = False,
        kind: str = "",
    ) -> None:
        """`device_kind`: of the tensors; `kind`: of the device that they stand for, where a step is traced for another one."""
        self.model, self.parameters, self.optimizer = model, parameters, optimizer
        self.precision, self.device_kind, self.clip_norm = precision, device_kind, clip_norm
        self.loss = SumLoss(model, kind=loss, device_kind=kind or device_kind)
        self.reduce_once = reduce_once
        self.shared: GradientSum | SharedGradients | None = None
        """Where several processes compute a step."""
        self.updating = False
        """Whether weights are being changed, or were when an update failed."""

    def backward(self, batches: Sequence[TensorBatch], trained_tokens: int, *, several: bool = False) -> Gradients:
        """Accumulate the gradient of (summed loss / trained_tokens) and clip it to `clip_norm` (0: not at all). `several`: some
        process of the step has several micro-batches."""
        losses = self.accumulate(batches, trained_tokens, several=several)
        return Gradients(losses=losses, norm=self.clip())

    def accumulate(self, batches: Sequence[TensorBatch], trained_tokens: int, *, several: bool = False) -> list[Tensor]:
        """Forward and backward passes; the summed loss of every micro-batch. `several`: others of the step follow."""
        if self.precision.masters:  # several micro-batches are summed in float32; the gradients of a single one need no more bits
            for parameter in self.parameters.values():
                parameter.grad_dtype = torch.float32 if several or len(batches) > 1 else parameter.dtype
        losses = []
        for number, batch in enumerate(batches):
            if self.reduce_once:
                self.model.set_requires_gradient_sync(number == len(batches) - 1)  # type: ignore[operator]
            if self.shared is not None and number == len(batches) - 1:
                self.shared.begin()
            losses.append(self.micro_batch(batch, trained_tokens, last=number == len(batches) - 1 and not several))
        if self.shared is not None:
            self.shared.finish()
        return losses

    def micro_batch(self, batch: TensorBatch, trained_tokens: int, *, last: bool) -> Tensor:
        """Forward and backward pass of one micro-batch; its summed loss. `last`: of the step."""
        with self.precision.autocast(self.device_kind):
            loss = self.loss(self.model, batch, factor=1 / trained_tokens)
        summed = loss.detach() * trained_tokens
        loss.backward()
        return summed

    def clip(self) -> Tensor:
        """Clip the gradient; its norm before. Where masters are kept, the optimizer multiplies while it reads the gradient."""
        masters = isinstance(self.optimizer, MasterAdamW)
        parameters = list(self.parameters.values()) if self.shared is None else self.shared.updated()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm: Tensor = gradient_norm(gradients) if masters else torch.nn.utils.get_total_norm(gradients)
        if self.shared is not None:
            norm = self.shared.whole_norm(norm)
        if self.clip_norm > 0 and isinstance(self.optimizer, MasterAdamW):  # as torch.nn.utils.clip_grad_norm_ does it
            self.optimizer.scale = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        elif self.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        return norm

    def update(self, rate: float) -> None:
        """Take the optimizer step at this learning rate and free the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.updating = True
        self.optimizer.step()
        if self.shared is not None:
            self.shared.publish()
        self.updating = False
        self.discard()

    def discard(self) -> None:
        """Free the gradients without a step."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.shared is not None:
            self.shared.discard()

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's state of a parameter; where processes share it, whole, in the first of them."""
        if isinstance(self.shared, SharedGradients):
            return self.shared.state(parameter, self.optimizer)
        return state_of(self.optimizer, parameter)

    def put_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Take over what `state_of` gave, in this run or in another one."""
        if isinstance(self.shared, SharedGradients):
            self.shared.put_state(parameter, self.optimizer, key, value)
        else:
            put_state(self.optimizer, parameter, key, value)


def share_step(step: TrainStep, world: World) -> None:
    """Let the processes of a world compute this step together: through memory where they are on one machine, else by sending."""
    if world.size == 1:
        return
    everywhere = not any(world.sum(float(not can_share(step.parameters))))
    size = memory_bytes(step.parameters, step.optimizer, world.size) if everywhere else 0
    memory = shared_memory(world, size) if size else None
    if memory is None:
        step.shared = GradientSum(step.parameters, world, embedding=lookup_table(step.model))
    else:
        step.shared = SharedGradients(step.parameters, step.optimizer, world, memory)
        arena.give_back()  # of loading, and of the residuals that each process had whole until now


def first_of(step: TrainStep, processes: int) -> TrainStep:
    """The step as the first of so many processes on a machine has it, to be traced."""
    if processes > 1:
        step.shared = SharedGradients(step.parameters, step.optimizer, World(0, processes), None)
    return step


def enable_recompute(model: nn.Module) -> None:
    """Drop activations in forward and compute them again in backward, block by block (transformers' own support), but for blocks
    that are to keep theirs (`sartor.model.choose_recomputed`)."""
    # transformers renamed it in 5.2x; 5.17 knows the old name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # type: ignore[operator]
    for module in model.modules():
        if getattr(module, KEEPS, False):
            module.gradient_checkpointing = False  # type: ignore[assignment]
