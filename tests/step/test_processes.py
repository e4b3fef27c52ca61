"""Gradients summed over three ranks are those of one step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ranks import on_ranks
from sartor.step import GradientSum, World

WIDTH, RANKS = 512, 3


def summed(rank: int, dtype: torch.dtype) -> list[Tensor | None]:
    """Gradients after two passes, the second of which is summed as it goes; rank 1 has one pass only, rank 2 none."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("first", "second", "sometimes", "never")}).to(dtype)
    total = GradientSum(dict(model.named_parameters()), World(rank, RANKS))
    for number in range(2 - rank):
        if number == 1 - rank:
            total.begin()
        hidden = model["second"](model["first"](inputs(rank, number, dtype)))
        if rank == 0:
            hidden = model["sometimes"](hidden)
        hidden.float().square().mean().backward()
    total.finish()
    return [parameter.grad for parameter in model.parameters()]


def inputs(rank: int, number: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * rank + number)).to(dtype)


def test_the_sum_is_that_of_all_passes() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("first", "second", "sometimes", "never")})
    for rank, number in ((0, 0), (0, 1), (1, 0)):
        hidden = model["second"](model["first"](inputs(rank, number, torch.float32)))
        if rank == 0:
            hidden = model["sometimes"](hidden)
        hidden.square().mean().backward()
    found = on_ranks(RANKS, summed, torch.float32)
    for gradients in found:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            if parameter.grad is None:
                assert gradient is None
            else:
                torch.testing.assert_close(gradient, parameter.grad)


def test_ranks_agree_to_the_bit_in_bfloat16() -> None:
    found = on_ranks(RANKS, summed, torch.bfloat16)
    for gradients in zip(*found, strict=True):
        assert all((one is None and gradients[0] is None) or torch.equal(one, gradients[0]) for one in gradients)
        assert gradients[0] is None or gradients[0].dtype == torch.bfloat16
