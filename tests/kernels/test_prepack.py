"""Frozen weights laid out once: the same products to the bit, for the layers that may have it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from matrices import laid as matrix
from matrices import normal
from sartor.kernels.linear import linear
from sartor.kernels.lora import Layer, linears
from sartor.kernels.loss import linear_cross_entropy
from sartor.kernels.matmul import has_tiles, laid_shape, lay_out, multiply
from sartor.kernels.prepack import BACKWARD, FORWARD, prepack, prepacked, prepacked_bytes, unpack

pytestmark = pytest.mark.skipif(not has_tiles(), reason="this processor has no tiles, or there is no compiler")


def frozen(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs).to(torch.bfloat16).requires_grad_(False)
    assert prepack(layer) == 1
    return layer


@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        (100, 96, 200),
        (37, 51, 34),
        (1100, 33, 80),
        (50, 1024, 200),  # rows of a that meet in a cache: other strips
        (35, 4096, 1570),  # more than a panel's depth, and wide panels
        (40, 2100, 100),
        (20, 7, 3),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_product_is_the_same_to_the_bit(m: int, k: int, n: int, turned: bool) -> None:
    torch.manual_seed(0)
    a, b = normal(m, k), matrix(k, n, turned)
    laid = lay_out(b)
    assert laid.shape == laid_shape(k, n)
    more, bias, there = (normal(m, 15), matrix(15, n, turned)), normal(n), normal(m, n)
    assert torch.equal(multiply(a, b, laid=laid), multiply(a, b))
    found, expected = (multiply(a, b, there.clone(), more=more, bias_N=bias, adds=True, laid=one) for one in (laid, None))
    assert torch.equal(found, expected)


def test_what_is_laid_out_is_what_is_multiplied() -> None:
    """Or the weight would be taken after all, and nothing gained."""
    a, b = normal(40, 96), normal(96, 64)
    laid = lay_out(b)
    assert not multiply(a, b, laid=laid.zero_()).any()


def test_rows_further_apart_may_want_other_strips() -> None:
    torch.manual_seed(0)
    a, b = matrix(40, 1000, gap=24), normal(1000, 70)  # 1,024 from one row to the next
    assert torch.equal(multiply(a, b, laid=lay_out(b).zero_()), multiply(a, b)), "of another shape, so not taken"


def passed(made: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return [made.detach(), *torch.autograd.grad(made, inputs, torch.randn_like(made))]


def test_layers_and_their_gradients_are_the_same_to_the_bit() -> None:
    torch.manual_seed(0)
    layer = frozen(96, 160)
    x, a, b = normal(2, 25, 96).requires_grad_(), normal(8, 96).requires_grad_(), normal(160, 8).requires_grad_()
    plain = Layer(layer.weight, layer.bias, a, b, scale=0.5)
    forward, backward = prepacked(layer)
    packed = plain._replace(forward=forward, backward=backward)
    for one, other in zip(*(passed(linears(x, [each])[0], [x, a, b]) for each in (packed, plain)), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(
        passed(linear(x, layer.weight, layer.bias, (forward, backward)), [x]),
        passed(linear(x, layer.weight, layer.bias), [x]),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_head_and_loss_are_the_same_to_the_bit() -> None:
    torch.manual_seed(0)
    head, hidden, targets = frozen(64, 530), normal(300, 64).requires_grad_(), torch.randint(0, 530, (300,))
    packed, plain = (linear_cross_entropy(hidden, head.weight, targets, laid=laid) for laid in (prepacked(head), (None, None)))
    assert torch.equal(packed, plain)
    assert torch.equal(*(torch.autograd.grad(loss, hidden)[0] for loss in (packed, plain)))


def test_which_layers_have_it() -> None:
    model = nn.ModuleDict(
        {
            "frozen": nn.Linear(64, 40).to(torch.bfloat16).requires_grad_(False),
            "trained": nn.Linear(64, 40).to(torch.bfloat16),
            "wide": nn.Linear(64, 40).requires_grad_(False),
            "other": nn.Embedding(64, 40).to(torch.bfloat16).requires_grad_(False),
        }
    )
    names = set(model.state_dict())
    assert prepack(model) == 1
    laid = prepacked(model["frozen"])
    assert all(tensor is not None for tensor in laid)
    assert all(prepacked(model[name]) == (None, None) for name in ("trained", "wide"))
    assert set(model.state_dict()) == names, "nothing of it is saved"
    unpack(model)
    assert prepacked(model["frozen"]) == (None, None)
    assert not dict(model["frozen"].named_buffers())


def test_it_takes_twice_the_weights_memory() -> None:
    layer = frozen(768, 2064)
    taken = sum(tensor.numel() * tensor.itemsize for tensor in layer.buffers())
    assert taken == pytest.approx(prepacked_bytes(layer), rel=0.02)


def test_a_weight_that_was_changed_is_laid_out_anew_in_its_products() -> None:
    layer = frozen(64, 40)
    x = normal(20, 64)
    layer.weight.mul_(2)
    assert prepacked(layer) == (None, None)
    assert torch.equal(linear(x, layer.weight, None, prepacked(layer)), multiply(x, layer.weight.t()))


def test_what_would_be_there_is_known_without_weights() -> None:
    real, sketch = nn.Linear(70, 50).to(torch.bfloat16), nn.Linear(70, 50, device="meta", dtype=torch.bfloat16)
    for layer in (real, sketch):
        assert prepack(layer.requires_grad_(False)) == 1
    for name in (FORWARD, BACKWARD):
        one, other = real.get_buffer(name), sketch.get_buffer(name)
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert other.is_meta
