"""Frozen weights laid out once for the products of `matmul.py` by tiles, beside the weights themselves: as the forward pass reads
them, and as the gradient of the input does. Otherwise every product lays them out again.

Twice their memory, and the same result to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sartor.kernels.matmul import laid_shape, lay_out, takes

Laid = tuple[Tensor | None, Tensor | None]
"""A weight for forward and for backward, where it is laid out."""
FORWARD, BACKWARD = "prepacked_forward", "prepacked_backward"
_VERSION = "_prepacked_version"


def prepack(model: nn.Module) -> int:
    """Lay out the weights of all frozen plain linear layers in bfloat16; how many there are. On the meta device nothing is
    computed, and what would be there is."""
    found = [module for module in model.modules() if _suits(module)]
    for module in found:
        weight_NK: Tensor = module.weight.detach()  # type: ignore[operator]
        for name, matrix in ((FORWARD, weight_NK.t()), (BACKWARD, weight_NK)):
            laid = matrix.new_empty(laid_shape(*matrix.shape)) if matrix.is_meta else lay_out(matrix)
            module.register_buffer(name, laid, persistent=False)
        setattr(module, _VERSION, module.weight._version)
    return len(found)


def unpack(model: nn.Module) -> None:
    """Free what `prepack` laid out."""
    for module in model.modules():
        if FORWARD in module._buffers:
            delattr(module, FORWARD)
            delattr(module, BACKWARD)


def prepacked(module: Any) -> Laid:
    """What `prepack` left with a linear layer, for forward and backward; nothing where the weight was changed since."""
    laid = module._buffers.get(FORWARD), module._buffers.get(BACKWARD)
    if laid[0] is None:
        return None, None
    weight = module.weight
    if type(weight) is nn.Parameter and not weight.is_meta and weight._version != getattr(module, _VERSION):
        return None, None
    return laid


def prepacked_bytes(model: nn.Module) -> int:
    """What `prepack` would take if all weights of `model` were frozen; it may live on the meta device."""
    return sum(2 * module.weight.numel() * 2 for module in model.modules() if type(module) is nn.Linear)


def _suits(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or any(parameter.requires_grad for parameter in module.parameters()):
        return False
    return module.weight.dtype == torch.bfloat16 and (module.weight.is_meta or takes(module.weight))
