"""Linear layers by products of our own: of any number of rows, with what is added, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from matrices import FORMAT, OURS, ROUNDING, laid, near, normal
from sartor.kernels import linear as module
from sartor.kernels.fuse import fuse, unfuse
from sartor.kernels.linear import LEAST_ROWS, linear, product_with
from sartor.kernels.lora import Layer, linears
from sartor.kernels.matmul import has_tiles

pytestmark = OURS


@pytest.mark.parametrize("rows", [1, 2, 15])
@pytest.mark.parametrize(("outside", "inside"), [(16, 32), (300, 70), (1000, 2050), (7, 64)])
@pytest.mark.parametrize("turned", [False, True])
def test_few_rows(rows: int, outside: int, inside: int, turned: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = normal(rows, inside), laid(outside, inside, turned), normal(outside)
    low, up = normal(rows, 5), laid(5, outside, not turned)
    product = x.double() @ weight.double().t()
    assert near(product_with(weight, x), product)
    found, exact = product_with(weight, x, (low, up), bias), product + low.double() @ up.double() + bias.double()
    between = product.abs().max() + exact.abs().max()  # rounded after every sum, of which there are many in float32
    assert found.is_contiguous()
    assert bool(((found.double() - exact).abs() <= (2 * ROUNDING + 1e-6) * between).all())


@pytest.mark.skipif(not has_tiles(), reason="this processor has no tiles")
def test_weights_of_few_rows_are_read_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("laid out")

    monkeypatch.setattr(module, "multiply", never)
    product_with(normal(32, 64), normal(LEAST_ROWS - 1, 64))
    with pytest.raises(AssertionError, match="laid out"):
        product_with(normal(32, 64), normal(LEAST_ROWS, 64))


@pytest.mark.parametrize("rows", [3, 40])
def test_it_is_the_same_where_no_gradients_are_wanted(rows: int) -> None:
    torch.manual_seed(0)
    x, layer = normal(2, rows, 64), Layer(normal(48, 64), normal(48), normal(5, 64).requires_grad_(), normal(48, 5), scale=0.5)
    with torch.no_grad():
        alone = linear(x, layer.weight_NK, layer.bias_N), *linears(x, [layer])
    assert not any(tensor.requires_grad for tensor in alone)
    assert torch.equal(alone[0], linear(x.requires_grad_(), layer.weight_NK, layer.bias_N))
    assert torch.equal(alone[1], linears(x, [layer])[0])


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_and_its_gradients(bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, constant, gradient = normal(2, 25, 34), normal(21, 34), normal(21) if bias else None, normal(2, 25, 21)
    given = [tensor.requires_grad_() for tensor in (x, weight, constant) if tensor is not None]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    found, expected = linear(*given), F.linear(*exact)
    assert near(found, expected.detach())
    for one, other in zip(
        torch.autograd.grad(found, given, gradient), torch.autograd.grad(expected, exact, gradient.double()), strict=True
    ):
        assert (one.double() - other).norm() < 5e-3 * other.norm()


def test_layers_of_a_model_take_part_and_give_it_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32, bias=False)).to(FORMAT)
    other = nn.Linear(32, 32, dtype=torch.float64)
    assert fuse(model) == {"linear layers": 2}
    assert fuse(other) == {}
    x = normal(LEAST_ROWS, 32)
    usual = F.linear(F.linear(x, model[0].weight, model[0].bias), model[1].weight)
    torch.testing.assert_close(model(x), usual, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(model(x[:2]), usual[:2], atol=2e-2, rtol=2e-2)
    unfuse(model)
    assert not any("forward" in vars(module) for module in model.modules())
