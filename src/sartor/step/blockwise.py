"""AdamW with moments in 8 bits (Dettmers et al. 2022, arXiv 2110.02861), in memory that is paged, or both.

On a CPU it is Sartor's own (`sartor.kernels.compact`). On CUDA, training takes bitsandbytes' optimizer, and the forecast a
stand-in that keeps and allocates what bitsandbytes 0.50 does there (optim/optimizer.py, backends/cuda/ops.py), and computes
nothing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sartor.errors import JobError
from sartor.kernels.compact import BLOCK, SMALLEST
from sartor.kernels.native import Operator

BITS = {"adamw-8bit": 8, "paged-adamw": 32, "paged-adamw-8bit": 8}
"""Of a moment, by `training.optimizer`."""
SMALLEST_PAGED = 100_000
"""Elements from which on they are paged (`get_state_buffer`)."""
_CODES = ("qmap1", "qmap2")
"""What the 256 values of 8 bits mean: the same for all parameters, and made anew when a run goes on."""


def is_blockwise(name: str) -> bool:
    """Whether `training.optimizer` keeps moments in blocks, or in pages: on CUDA it is bitsandbytes'."""
    return name in BITS


def is_paged(name: str) -> bool:
    """Whether its moments are in CUDA's unified memory: on the device while there is room, else on the host."""
    return name.startswith("paged-")


def moment_bytes(name: str, width: int) -> float:
    """Bytes on the device that an optimizer keeps of each parameter, in large tensors of `width` bytes an element."""
    if name == "sgd" or is_paged(name):
        return 0
    return 2 * (1 + 4 / BLOCK) if is_blockwise(name) else 2 * width


def check_optimizer(name: str, device_kind: str, *, devices: int = 1, processes: int = 1) -> None:
    """Raises JobError where a job cannot have this optimizer; a forecast needs nothing installed."""
    if not is_blockwise(name):
        return
    if is_paged(name) and device_kind != "cuda":
        raise JobError(
            f"`training.optimizer` is {name}, and the job computes on a device of kind {device_kind}",
            why="what is paged lives in CUDA's unified memory",
            remedy=f"training.optimizer={name.removeprefix('paged-')}",
        )
    if processes > 1:
        raise JobError(
            f"`training.optimizer` is {name}, and `strategy.processes` is {processes}",
            why="processes share the moments out, and 8 bits of them have a scale for 256 together",
            remedy="strategy.processes=1, or training.optimizer=adamw",
        )
    if devices > 1:
        raise JobError(
            f"`training.optimizer` is {name}, and the job is for {devices} devices",
            why="bitsandbytes' kernels update whole tensors, not FSDP2's shards of them",
            remedy="training.optimizer=adamw (FSDP2 shares its moments out), or a machine with one device",
        )


def check_installed(name: str, device_kind: str) -> None:
    """Raises JobError where training with this optimizer lacks bitsandbytes."""
    if is_blockwise(name) and device_kind != "cpu" and importlib.util.find_spec("bitsandbytes") is None:
        raise JobError(
            f"`training.optimizer` is {name}, and bitsandbytes is not installed",
            why="it holds the moments and does the arithmetic; only the forecast does without",
            remedy="pip install 'sartor[quant]', or training.optimizer=adamw",
        )


def make_blockwise(name: str, groups: list[dict[str, Any]], *, traced: bool, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of a run on CUDA; of a `traced` one, its stand-in. Raises JobError."""
    if traced:
        return StandIn(groups, bits=BITS[name], paged=is_paged(name))
    check_installed(name, "cuda")
    from bitsandbytes import optim  # type: ignore[import-not-found,unused-ignore]

    classes = {"adamw-8bit": optim.AdamW8bit, "paged-adamw": optim.PagedAdamW32bit, "paged-adamw-8bit": optim.PagedAdamW8bit}
    return classes[name](groups, **options)  # type: ignore[no-any-return,unused-ignore]


class StandIn(torch.optim.Optimizer):
    """What bitsandbytes' optimizer keeps and allocates; its updates change nothing."""

    def __init__(self, groups: list[dict[str, Any]], *, bits: int, paged: bool) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.bits, self.paged = bits, paged
        self.codes: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    self._begin(parameter, state)
                _adamw_blockwise(parameter, parameter.grad.contiguous(), state["state1"], state["state2"])

    def _begin(self, parameter: Tensor, state: dict[str, Any]) -> None:
        small = self.bits == 32 or parameter.numel() < SMALLEST
        if not small and not self.codes:
            self.codes = [torch.empty(256) for _ in _CODES]  # moved to the device
        dtype = torch.float32 if small else torch.uint8
        for name in ("state1", "state2"):
            state[name] = torch.zeros_like(parameter, dtype=dtype)
            if self.paged and parameter.numel() >= SMALLEST_PAGED:
                state[name].is_paged = True
        if not small:
            blocks = -(-parameter.numel() // BLOCK)
            for name in ("absmax1", "absmax2"):
                state[name] = torch.zeros(blocks, dtype=torch.float32)


_adamw_blockwise = Operator(
    "adamw_blockwise_(Tensor(a!) weight, Tensor gradient, Tensor(b!) first, Tensor(c!) second) -> ()",
    lambda *_: None,
    lambda *_: None,
)
"""bitsandbytes' kernel, which takes no memory."""


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What a checkpoint keeps of a parameter's state, of any optimizer."""
    return {key: torch.as_tensor(value) for key, value in optimizer.state[parameter].items() if key not in _CODES}


def put_state(optimizer: Any, parameter: Tensor, key: str, value: Tensor) -> None:
    """Take over what `state_of` gave. bitsandbytes makes its buffers itself, where they belong; they are filled."""
    state = optimizer.state[parameter]
    if not hasattr(optimizer, "init_state"):
        state[key] = value.to(parameter.device)
        return
    if not state:
        for at, group in enumerate(optimizer.param_groups):
            for place, other in enumerate(group["params"]):
                if other is parameter:
                    optimizer.init_state(group, parameter, at, place)
    if key == "step":
        state[key] = int(value)
    else:
        state[key].copy_(value)
