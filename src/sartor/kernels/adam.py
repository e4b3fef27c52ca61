"""AdamW in one pass, on float32 master weights in two halves: the bfloat16 weight that the model computes with, and a residual.

The weight is the master rounded to the nearest bfloat16; the residual, a signed 16-bit number, is what its bits lack to be those
of the float32. Together they are the float32, in its 4 bytes, to the last bit. Gradients are clipped while they are read.

The merged master is, bit by bit, what PyTorch's AdamW in float32 makes of the same gradients: `fused` where the loops are
compiled and the processor has fused multiply-add (but for the few elements at the end that fill no vector register, which PyTorch
rounds otherwise), the plain one (`foreach=False`) where PyTorch's operators are used. Clipping
multiplies in float32 and stores nothing. (Weights are split with ties away from zero, `.to(torch.bfloat16)` goes to even ones.)
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sartor.kernels.calls import call, in_one_call
from sartor.kernels.native import Operator, library

PIECE = 2**18
"""Elements that PyTorch's operators take at once where there is no compiler, so that their temporaries stay in cache."""
DEVICE_PIECE = 2**22
"""The same on an accelerator, where temporaries are to be few and operators large."""

_RATES = "scale", "decay", "first", "second", "kept", "step", "correction", "epsilon"


class _Update(ctypes.Structure):
    """`struct to_update` of native.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "residual", "gradient", "first_moment", "second_moment")),
        *((name, ctypes.c_int64) for name in ("count", "threads")),
        *((name, ctypes.c_float) for name in _RATES),
    )


class _Squares(ctypes.Structure):
    """`struct to_square` of native.cpp."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("values", "sums")), ("count", ctypes.c_int64), ("threads", ctypes.c_int64))


RESIDUAL = "residual"
MOMENTS = ("exp_avg", "exp_avg_sq")


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as (bfloat16, int16 residual)."""
    bits = master.contiguous().view(torch.int32)
    upper = (bits + 0x8000) >> 16
    residual = (bits - (upper << 16)).to(torch.int16)
    return upper.to(torch.int16).view(torch.bfloat16), residual


def merge(weight: Tensor, residual: Tensor) -> Tensor:
    """The float32 tensor that was split."""
    bits = (weight.contiguous().view(torch.int16).to(torch.int32) << 16) + residual.to(torch.int32)
    return bits.view(torch.float32)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) for bfloat16 parameters with exact float32 masters.

    A parameter's residual is state like its moments. `start`: residuals of parameters that were split from float32; others
    start as the float32 that their bfloat16 is. Gradients may be bfloat16 or float32.
    """

    _in_one_call = True
    """Whether nothing that an update computes is read before the last one."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        start: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.scale: Tensor | None = None
        """What the next step multiplies gradients by."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._begin(parameter, (start or {}).get(parameter))

    def _begin(self, parameter: Tensor, residual: Tensor | None) -> None:
        """What is kept of a parameter from the start."""
        if parameter.dtype != torch.bfloat16:
            raise ValueError(f"MasterAdamW is for bfloat16 parameters, this one is {parameter.dtype}")
        self.state[parameter][RESIDUAL] = torch.zeros_like(parameter, dtype=torch.int16) if residual is None else residual

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updated = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, _ in updated:  # all memory first: where there is too little, nothing has changed
            if "step" not in self.state[parameter]:
                self.state[parameter] |= self._moments(parameter) | {"step": torch.zeros(())}
        with in_one_call(when=self._in_one_call):
            for parameter, group in updated:
                torch.autograd.graph.increment_version(parameter)  # operators of our own do not
                self._update(parameter, group)
        self.scale = None
        return loss

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """As they are before the first step."""
        return {moment: torch.zeros_like(parameter, dtype=torch.float32) for moment in MOMENTS}

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] += 1
        tensors = (parameter, state[RESIDUAL], parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        adamw_(*tensors, state["step"], self.scale, float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """PyTorch's own would give all state the parameters' format."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for key, value in saved.get(number, {}).items():
                self.state[parameter][key] = value.clone() if key == "step" else value.to(parameter.device, copy=True)


@functools.lru_cache(maxsize=64)  # most parameters of a step have the same
def _rates(step: float, scale: float, lr: float, beta1: float, beta2: float, eps: float, decay: float) -> dict[str, float]:
    """What an update needs of its hyperparameters, by the names of `native.cpp`."""
    corrected, correction = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    return dict(zip(_RATES, (scale, 1 - lr * decay, 1 - beta1, 1 - beta2, beta2, corrected, correction, eps), strict=True))


def update(
    weight: Tensor,
    residual: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: Tensor,
    scale: Tensor | None,
    *hyperparameters: float,
) -> None:
    """One parameter, or a part of one, in place. `scale`: of its gradient."""
    rates = _rates(float(step), 1.0 if scale is None else float(scale), *hyperparameters)
    gradient = gradient.contiguous()
    tensors = (weight, residual, gradient, first, second)
    native = library() if weight.is_cpu and all(tensor.is_contiguous() for tensor in tensors) else None
    if native is not None:
        kernel = native.adamw_bf16 if gradient.dtype == torch.bfloat16 else native.adamw_f32
        places = [tensor.data_ptr() for tensor in tensors]
        call(kernel, _Update(*places, weight.numel(), torch.get_num_threads(), *rates.values()), None, 0, *tensors)
    elif all(tensor.is_contiguous() for tensor in tensors):
        size = PIECE if weight.is_cpu else DEVICE_PIECE
        for piece in zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True):
            _adamw_by_operators(piece, rates)
    else:
        _adamw_by_operators(tensors, rates)


def _adamw_by_operators(tensors: Sequence[Tensor], rates: dict[str, float]) -> None:
    """The same by PyTorch's operators."""
    weight, residual, gradient, first, second = tensors
    gradient = gradient.float() * rates["scale"]
    first.lerp_(gradient, rates["first"])
    second.mul_(rates["kept"]).addcmul_(gradient, gradient, value=rates["second"])
    below = second.sqrt().div_(rates["correction"]).add_(rates["epsilon"])
    master = merge(weight, residual).mul_(rates["decay"]).addcdiv_(first, below, value=-rates["step"])
    upper, lower = split(master)
    weight.copy_(upper)
    residual.copy_(lower)


adamw_ = Operator(
    "adamw_(Tensor(a!) weight, Tensor(b!) residual, Tensor gradient, Tensor(c!) first, Tensor(d!) second, Tensor step, "
    "Tensor? scale, float lr, float beta1, float beta2, float eps, float decay) -> ()",
    update,
    lambda *_: None,
)


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    with in_one_call():
        parts = [_squares(gradient) for gradient in gradients]
    return norm_of_squares(list(map(_sum, parts)), gradients[0].device if gradients else None)


def norm_of_squares(squares: Sequence[float | Tensor], device: torch.device | None) -> Tensor:
    """The norm of gradients whose sums of squares these are."""
    if any(isinstance(square, Tensor) for square in squares):
        total = torch.stack([torch.as_tensor(square, dtype=torch.float64, device=device) for square in squares]).sum()
        return total.sqrt().float()
    return torch.tensor(math.sqrt(sum(map(float, squares))), dtype=torch.float32, device=device)


def square_sum(gradient: Tensor) -> float | Tensor:
    """The sum of squares, in float32 by blocks and in float64 over them; on an accelerator a tensor, for which nobody waits."""
    return _sum(_squares(gradient))


def _sum(parts: float | Tensor) -> float | Tensor:
    return float(parts.sum()) if isinstance(parts, Tensor) and parts.is_cpu else parts


def _squares(gradient: Tensor) -> float | Tensor:
    """The sums of squares of blocks, on a CPU, or of all."""
    if not gradient.is_cpu:
        norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        return norm.double().square()
    native = library() if gradient.is_cpu and gradient.dtype in (torch.bfloat16, torch.float32) else None
    if native is None:
        return sum(float(piece.float().square().sum()) for piece in gradient.reshape(-1).split(PIECE))
    gradient = gradient.contiguous()
    blocks = torch.empty(-(-gradient.numel() // native.block()), dtype=torch.float64)
    kernel = native.squares_bf16 if gradient.dtype == torch.bfloat16 else native.squares_f32
    problem = _Squares(gradient.data_ptr(), blocks.data_ptr(), gradient.numel(), torch.get_num_threads())
    call(kernel, problem, None, 0, gradient, blocks)
    return blocks


gradient_norm = Operator(
    "gradient_norm(Tensor[] gradients) -> Tensor",
    _norm,
    lambda gradients: gradients[0].new_empty((), dtype=torch.float32) if gradients else torch.empty(()),
)
