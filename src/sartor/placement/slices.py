"""The update of a row that is too large to be in memory with all that the optimizer keeps of it: by slices.

Weights and gradients of the row are there; of the state, what belongs to some elements is read, updated and written, then what
belongs to the next. So embeddings take 8 bytes a parameter in float32 at once instead of 16. An optimizer can be asked for that
whose update of an element looks at this element's numbers alone: a slice is a parameter of its own to it, and the result is the
same to the bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from sartor.kernels.adam import MasterAdamW
from sartor.kernels.compact import CompactAdamW
from sartor.placement.chunk import Chunk, Gauge
from sartor.placement.host import Before, like
from sartor.plan import table

ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    MasterAdamW,
    CompactAdamW,
)
"""Optimizers whose update goes by elements."""


def can_slice(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer can be asked for an update by slices."""
    return type(optimizer) in ELEMENTWISE


def kept_bytes(optimizer: torch.optim.Optimizer) -> float:
    """What the optimizer keeps of an element of its parameters, from a step with a small one."""
    accepted = inspect.signature(type(optimizer)).parameters
    options = {key: value for key, value in (vars(optimizer) | optimizer.defaults).items() if key in accepted}
    small = nn.Parameter(torch.zeros(64, 64, dtype=optimizer.param_groups[0]["params"][0].dtype))
    try:
        probe = type(optimizer)([small], **options)
        small.grad = torch.zeros_like(small)
        probe.step()
    except Exception:  # a foreign optimizer that wants more than its defaults: taken to be like Adam
        return 8.0
    state = [value for value in probe.state[small].values() if isinstance(value, Tensor)]
    return sum(value.untyped_storage().nbytes() for value in state if value.numel() > 1) / small.numel()


class Slices:
    """Takes an optimizer's step for parameters whose state is away, and stays away."""

    def __init__(self, optimizer: torch.optim.Optimizer, gauge: Gauge) -> None:
        self._optimizer, self._gauge = optimizer, gauge

    def update(
        self, chunk: Chunk, gradients: dict[nn.Parameter, Tensor], before: Before | None, *, scaled: Collection[nn.Parameter] = ()
    ) -> None:
        """Of these parameters. `chunk`: the home of what the optimizer keeps of them; `scaled`: whose gradients went through
        `before` already."""
        for parameter, gradient in gradients.items():
            own: Any = self._alone(parameter)
            known, scalars = tuple(self._optimizer.state[parameter]), {}
            for first, count in table.slices(parameter.numel()):
                piece = nn.Parameter(parameter.detach().view(-1)[first : first + count])
                piece.grad_dtype = gradient.dtype
                piece.grad = gradient.view(-1)[first : first + count]
                own.param_groups[0]["params"] = [piece]
                if isinstance(own, CompactAdamW):
                    own.stand_in(piece, parameter, first, self._optimizer)
                if before is not None:
                    before([] if parameter in scaled else [piece.grad], own)
                scalars = self._step(own, chunk, parameter, piece, first, known)
            self._optimizer.state[parameter] |= scalars

    def _step(
        self,
        own: torch.optim.Optimizer,
        chunk: Chunk,
        parameter: nn.Parameter,
        piece: nn.Parameter,
        first: int,
        known: Collection[str],
    ) -> dict[str, Any]:
        """Update a slice, and what is kept of it; `known`: what was kept before this step. Returns what is kept of the parameter
        as a whole, as it is after the step."""
        kept, count = self._optimizer.state[parameter], piece.numel()
        state: dict[str, Any] = {}
        for key in known:
            value = kept[key]
            if _is_large(value):
                ratio = _ratio(parameter, value)
                state[key] = chunk.read_part(value, first // ratio, -(-count // ratio))
            else:
                state[key] = value.clone() if isinstance(value, Tensor) else value
        own.state[piece] = state
        own.step()
        del own.state[piece]
        large = {key: value for key, value in state.items() if _is_large(value)}
        made = {key: value for key, value in large.items() if key not in kept}
        if made:
            kept |= self._reserve(chunk, parameter, count, made)
        size = sum(value.nbytes for value in large.values())
        self._gauge.add(size)
        for key, value in large.items():
            chunk.write_part(kept[key], first // _ratio(parameter, kept[key]), value)
        self._gauge.add(-size)
        return {key: value for key, value in state.items() if key not in large}

    @staticmethod
    def _reserve(chunk: Chunk, parameter: nn.Parameter, count: int, made: dict[str, Tensor]) -> dict[str, Tensor]:
        """Room for the state of a whole parameter, of which that of the first `count` elements is made."""
        whole = {}
        for key, value in made.items():
            shape = parameter.shape
            if value.numel() != count:
                shape = torch.Size([-(-parameter.numel() // -(-count // value.numel()))])
            whole[key] = torch.empty(shape, dtype=value.dtype, device="meta")
        return dict(zip(whole, chunk.reserve(list(whole.values())), strict=True))

    def _alone(self, parameter: nn.Parameter) -> Any:
        """An optimizer of the same kind and settings, for slices of this parameter."""
        own = like(self._optimizer)
        groups = self._optimizer.param_groups
        own.param_groups = [{**group, "params": []} for group in groups if any(p is parameter for p in group["params"])]
        return own


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1


def _ratio(parameter: Tensor, value: Tensor) -> int:
    """Elements of a parameter for one of its state."""
    return -(-parameter.numel() // value.numel())
