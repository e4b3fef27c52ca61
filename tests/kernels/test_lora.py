"""Adapters beside frozen linear layers: what PEFT's layers compute, in one function."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from matrices import FORMAT, OURS
from sartor.kernels import linear, lora
from sartor.kernels.fuse import fuse, unfuse
from sartor.kernels.lora import MOST_RANK, Layer, linears, lora_of
from sartor.kernels.native import products_library

pytestmark = pytest.mark.skipif(products_library() is None, reason="there is no C++ compiler")


@pytest.fixture(params=["as it is", "floats"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this processor; of one that multiplies no pairs."""
    if request.param == "floats":
        monkeypatch.setattr(lora, "takes", lambda *_: False)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inside", "outside", "rank", "bias"),
    [(100, 64, 48, 16, False), (37, 20, 33, 5, True), (3, 300, 530, MOST_RANK, False), (65, 50, 30, 33, True)],
)
def test_it_is_the_layer_and_its_adapter(dtype: torch.dtype, rows: int, inside: int, outside: int, rank: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    x, weight, a, b = normal(2, rows, inside), normal(outside, inside), normal(rank, inside), normal(outside, rank)
    constant = normal(outside) if bias else None
    inputs = [tensor.requires_grad_() for tensor in (x, a, b)]
    (found,) = linears(x, [Layer(weight, constant, a, b, scale=2.0)])
    gradient = normal(2, rows, outside)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    low = F.linear(F.linear(exact[0], exact[1]), exact[2]) * 2.0
    expected = F.linear(exact[0], weight.double(), None if constant is None else constant.double()) + low
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, exact, gradient.double()), strict=True
    )
    for one, other in pairs:
        assert one.dtype == dtype
        error = (one.double() - other).norm() / other.norm()
        assert error < (1e-6 if dtype == torch.float32 else 4e-3)


def adapted(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 8)), LoraConfig(target_modules=["0", "1"], **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model.train()


def test_peft_layers_give_the_same_and_may_be_turned_off() -> None:
    model, x = adapted(r=4), torch.randn(7, 24)
    usual = copy.deepcopy(model)
    assert fuse(model)["adapters"] == 2
    torch.testing.assert_close(model(x), usual(x), atol=1e-5, rtol=1e-5)
    with model.disable_adapter(), usual.disable_adapter():
        torch.testing.assert_close(model(x), usual(x), atol=1e-6, rtol=1e-6)
    model.merge_adapter()
    usual.merge_adapter()
    torch.testing.assert_close(model(x), usual(x), atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    unfuse(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_first_layer_asks_for_no_gradient_of_its_input() -> None:
    model = adapted(r=4)
    fuse(model)
    x = torch.randn(7, 24, requires_grad=True)
    model(x).sum().backward()
    with_input = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    model(x.detach()).sum().backward()
    for name, parameter in model.named_parameters():
        if name in with_input:
            assert torch.equal(parameter.grad, with_input[name])


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"r": 2 * MOST_RANK}])
def test_other_adapters_are_left_to_peft(options: dict[str, object]) -> None:
    model = adapted(**{"r": 4, **options})
    assert all(lora_of(module) is None for module in model.modules())


class Attention(nn.Module):
    """Of a decoder, as far as its layers are concerned."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(24, 48), nn.Linear(24, 16), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return torch.cat([queries, keys, values], -1)


class Crossed(Attention):
    """Keys and values of something else."""

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x if other is None else other), self.v_proj(x)], -1)


def attentions(kind: type[Attention], dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """With adapters; the same, left as PEFT has it."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(kind()), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"])).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model.train(), copy.deepcopy(model).train()


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    (model(x).float() ** 2).sum().backward()
    trained = {name: parameter.grad.float() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"x": x.grad.float(), **trained}  # type: ignore[union-attr]


@OURS
def test_trained_layers_with_one_input_are_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Attention()).to(FORMAT)
    usual, x, seen = copy.deepcopy(model), torch.randn(40, 24).to(FORMAT), []
    computed = linear.linears
    monkeypatch.setattr(linear, "linears", lambda x, layers: seen.append(len(layers)) or computed(x, layers))
    fuse(model)
    found, wanted = gradients(model, x), gradients(usual, x)
    assert seen == [3]
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert (found[name] - one).norm() <= 2e-2 * one.norm(), name
    unfuse(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_layers_with_one_input_are_one_function(dtype: torch.dtype, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, usual = attentions(Attention, dtype)
    seen = []
    computed = lora.linears
    monkeypatch.setattr(lora, "linears", lambda x, layers: seen.append(len(layers)) or computed(x, layers))
    fuse(model)
    x = torch.randn(40, 24).to(dtype)
    found, wanted = gradients(model, x), gradients(usual, x)
    assert seen == [3]
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert (found[name] - one).norm() <= least * one.norm(), name
    unfuse(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_that_may_have_other_inputs_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, usual = attentions(Crossed, torch.float32)
    seen = []
    computed = lora.linears
    monkeypatch.setattr(lora, "linears", lambda x, layers: seen.append(len(layers)) or computed(x, layers))
    fuse(model)
    x = torch.randn(5, 24)
    torch.testing.assert_close(model(x), usual(x))
    assert seen == [1, 1, 1]


def test_a_layer_with_a_hook_is_computed_when_it_is_called() -> None:
    model, usual = attentions(Attention, torch.float32)
    fuse(model)
    attention = model.base_model.model[0]  # type: ignore[union-attr, index]
    order: list[str] = []
    weight = attention.k_proj.base_layer.weight  # type: ignore[union-attr]

    def fetch(*_: object) -> None:
        weight.data.zero_()

    attention.k_proj.register_forward_pre_hook(fetch)  # type: ignore[union-attr]
    attention.k_proj.register_forward_hook(lambda *_: order.append("keys"))  # type: ignore[union-attr]
    usual.base_model.model[0].k_proj.base_layer.weight.data.zero_()  # type: ignore[union-attr, index]
    x = torch.randn(5, 24)
    torch.testing.assert_close(model(x), usual(x))
    assert order == ["keys"]


def test_nothing_is_kept_of_a_pass_that_fails() -> None:
    model, _ = attentions(Attention, torch.float32)
    fuse(model)
    attention = model.base_model.model[0]  # type: ignore[union-attr, index]
    handle = attention.v_proj.register_forward_hook(lambda *_: 1 / 0)  # type: ignore[union-attr]
    siblings = attention.forward.func.__self__  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(5, 24))
    assert siblings.given is None
    assert not siblings.made
    handle.remove()
    assert model(torch.randn(5, 24)).shape == (5, 80)
