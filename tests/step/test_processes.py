"""Gradients summed over three ranks are those of one step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ranks import on_ranks
from sartor.step import GradientSum, World
from sartor.step.processes import lookup_table

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


def looked_up(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Gradients of a table in two steps of two ranks, that of the sum and the true one."""
    torch.manual_seed(0)
    found = []
    table, reference = (nn.Embedding(2000, 64) for _ in range(2))
    reference.load_state_dict(table.state_dict())
    assert lookup_table(Holder(table)) is table.weight
    total = GradientSum({"table": table.weight}, World(rank, 2), embedding=table.weight)
    for number in range(3):
        tokens = [torch.arange(5 * other + number, 9 * other + number + 7) for other in range(2)]
        table.weight.grad = reference.weight.grad = None
        total.expect(torch.unique(torch.cat(tokens)))
        total.begin()
        table(tokens[rank]).square().sum().backward()
        total.finish()
        for some in tokens:
            reference(some).square().sum().backward()
        assert table.weight.grad is not None
        assert reference.weight.grad is not None
        found.append((table.weight.grad, reference.weight.grad))
    return found


class Holder(nn.Module):
    """A model that has input embeddings, tied where it gets two."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def get_input_embeddings(self) -> nn.Module:
        return self.layers[0]


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


def test_a_table_is_summed_by_rows() -> None:
    for gradients in on_ranks(2, looked_up):
        for ours, reference in gradients:
            torch.testing.assert_close(ours, reference)


def test_a_tied_table_is_not_looked_up_only() -> None:
    table, head = nn.Embedding(20, 4), nn.Linear(4, 20, bias=False)
    head.weight = table.weight
    assert lookup_table(Holder(table, head)) is None


def test_ranks_agree_to_the_bit_in_bfloat16() -> None:
    found = on_ranks(RANKS, summed, torch.bfloat16)
    for gradients in zip(*found, strict=True):
        assert all((one is None and gradients[0] is None) or torch.equal(one, gradients[0]) for one in gradients)
        assert gradients[0] is None or gradients[0].dtype == torch.bfloat16
