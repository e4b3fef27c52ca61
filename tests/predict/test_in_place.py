"""Gradients that meet are added up in place, as autograd does it where nobody watches: counted by PyTorch's own profiler."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from sartor.predict import StorageTracker

WIDTH, ROWS = 64, 1000


class Residual(nn.Module):
    """Blocks that use their input twice or three times, and once through a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x_RH: Tensor) -> Tensor:
        for layer in self.layers:
            x_RH = x_RH + layer(x_RH.tanh()) * x_RH.sigmoid()
            x_RH = x_RH + layer(x_RH.view(2, -1, WIDTH)).view(-1, WIDTH)
        return torch.cat([x_RH, -x_RH, x_RH * 2.0], dim=1).square().sum()


def counted() -> tuple[int, int]:
    """What a forward and backward pass holds at most, beside weights and input, and takes in all: as the allocator sees it."""
    torch.manual_seed(0)
    model, x_RH = Residual(), torch.randn(ROWS, WIDTH)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        model(x_RH).backward()
    assert told.profiler is not None
    assert told.profiler.kineto_results is not None
    events = [event for event in told.profiler.kineto_results.events() if event.name() == "[memory]"]
    return _peak_and_sum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])


def tracked(*, fake: bool) -> tuple[tuple[int, int], dict[str, Tensor]]:
    """The same as the tracker sees it, and the gradients."""
    torch.manual_seed(0)
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.enable_grad():
        model, x_RH = Residual(), torch.randn(ROWS, WIDTH)
        tracker = StorageTracker()
        with tracker:
            tracker.mark([*model.parameters(), x_RH], "weights")
            tracker.begin("step")
            model(x_RH).backward()
            tracker.close()
    sizes = [event.size_bytes for event in tracker.ledger.events if event.phase == "step"]
    return _peak_and_sum(sizes), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _peak_and_sum(sizes: list[int]) -> tuple[int, int]:
    return max(itertools.accumulate(sizes)), sum(size for size in sizes if size > 0)


@pytest.mark.parametrize("fake", [False, True])
def test_peak_and_sum_are_the_allocators(fake: bool) -> None:
    assert tracked(fake=fake)[0] == pytest.approx(counted(), abs=100)  # a few scalars are made by no operator


def test_gradients_stay_what_they_are() -> None:
    torch.manual_seed(0)
    model, x_RH = Residual(), torch.randn(ROWS, WIDTH)
    model(x_RH).backward()
    seen = tracked(fake=False)[1]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, seen[name]), name
