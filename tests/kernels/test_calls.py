"""Loops that wait for each other and run in one call."""

from __future__ import annotations

import threading

import pytest
import torch

from matrices import FORMAT, OURS, normal
from sartor.kernels.calls import in_one_call
from sartor.kernels.linear import Layer, linears
from sartor.kernels.matmul import multiply

pytestmark = OURS


def chain(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b b^T b: what one writes the next reads."""
    return multiply(multiply(multiply(a, b), b.t()), b)


def test_they_run_at_the_end_one_after_the_other() -> None:
    torch.manual_seed(0)
    a, b, c = normal(40, 70), normal(70, 300), torch.zeros(40, 300, dtype=FORMAT)
    with in_one_call(a):
        multiply(a, b, c)
        assert not c.any()
        found = chain(a, b)
    assert torch.equal(c, multiply(a, b))
    assert torch.equal(found, chain(a, b))


def test_nothing_runs_where_an_exception_leaves() -> None:
    a, b, c = normal(40, 64), normal(64, 32), torch.zeros(40, 32, dtype=FORMAT)

    def fail() -> None:
        with in_one_call(a):
            multiply(a, b, c)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not c.any()
    multiply(a, b, c)
    assert c.any()


def test_each_runs_at_once_where_something_listens() -> None:
    torch.manual_seed(0)
    a, b = normal(40, 70), normal(70, 300)
    with torch.profiler.profile() as profile, in_one_call(a):
        found = chain(a, b)
        assert torch.equal(found, chain(a, b))
    assert sum(event.key == "sartor::matmul_" and event.count for event in profile.key_averages()) == 6


def test_another_thread_does_not_wait() -> None:
    torch.manual_seed(0)
    a, b, c = normal(40, 64), normal(64, 32), torch.zeros(40, 32, dtype=FORMAT)
    with in_one_call(a):
        thread = threading.Thread(target=multiply, args=(a, b, c))
        thread.start()
        thread.join()
        assert c.any()


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("trained", [(True, True), (False, True)])
def test_layers_with_one_input_are_the_same_as_one_by_one(rows: int, trained: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    x = normal(2, rows, 64).requires_grad_()
    layers = [Layer(normal(size, 64).requires_grad_(train), normal(size)) for size, train in zip((48, 96), trained, strict=True)]
    given = [x, *(layer.weight_NK for layer in layers if layer.weight_NK.requires_grad)]
    gradients = [normal(2, rows, size) for size in (48, 96)]
    together, apart = linears(x, layers), tuple(linears(x, [layer])[0] for layer in layers)
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)
    found, wanted = (torch.autograd.grad(made, given, gradients) for made in (together, apart))
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(found[0], wanted[0], atol=0.2, rtol=2e-2)  # a sum that is rounded once, and one that is twice
