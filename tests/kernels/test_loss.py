"""Head and loss in one go: what PyTorch computes one after the other, compiled or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sartor.kernels import loss, native
from sartor.kernels.loss import Finish, linear_cross_entropy

ROWS, WIDTH, VOCABULARY = 150, 48, 331


@pytest.fixture(params=["compiled", "operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled loops, and without; several chunks in both cases."""
    monkeypatch.setattr(loss, "FEWEST_ROWS", 16)
    monkeypatch.setattr(loss, "MOST_ROWS", 33)
    if request.param == "operators":
        monkeypatch.setattr(loss, "library", lambda: None)
    elif native.library() is None:
        pytest.skip(native.missing())
    return str(request.param)


def inputs(dtype: torch.dtype, *, bias: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)
    tensors = {"hidden_NH": torch.randn(ROWS, WIDTH), "weight_VH": torch.randn(VOCABULARY, WIDTH) * 0.3}
    if bias:
        tensors["bias_V"] = torch.randn(VOCABULARY)
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


def targets() -> Tensor:
    return torch.randint(0, VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(2))


def plain(given: dict[str, Tensor], finish: Finish) -> Tensor:
    logits = F.linear(given["hidden_NH"], given["weight_VH"], given.get("bias_V")) * finish.scale
    if finish.cap:
        logits = finish.cap * torch.tanh(logits / finish.cap)
    return F.cross_entropy(logits.float(), targets(), reduction="sum") / ROWS


def together(given: dict[str, Tensor], finish: Finish) -> Tensor:
    return linear_cross_entropy(
        given["hidden_NH"], given["weight_VH"], targets(), bias_V=given.get("bias_V"), finish=finish, factor=1 / ROWS
    )


def results(compute: Any, given: dict[str, Tensor], finish: Finish) -> dict[str, Tensor]:
    value = compute(given, finish)
    value.backward()
    return {"loss": value.detach(), **{name: tensor.grad for name, tensor in given.items() if tensor.grad is not None}}


def error(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("finish", [Finish(), Finish(scale=0.25), Finish(cap=5.0), Finish(scale=2.0, cap=3.0)])
def test_float32_is_what_pytorch_computes(way: str, finish: Finish, bias: bool) -> None:
    wanted = results(plain, inputs(torch.float32, bias=bias), finish)
    made = results(together, inputs(torch.float32, bias=bias), finish)
    assert made.keys() == wanted.keys()
    for name, tensor in made.items():
        assert error(tensor, wanted[name]) < 1e-6, name


@pytest.mark.parametrize("finish", [Finish(), Finish(scale=2.0, cap=3.0)])
def test_bfloat16_is_as_near_to_float32_as_pytorch(way: str, finish: Finish) -> None:
    given = inputs(torch.bfloat16, bias=True)
    exact = results(plain, {name: tensor.detach().float().requires_grad_() for name, tensor in given.items()}, finish)
    theirs = results(plain, given, finish)
    for tensor in given.values():
        tensor.grad = None
    ours = results(together, given, finish)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        # The product of every chunk is rounded, and their sum; PyTorch rounds one product. Here are three chunks.
        allowed = 1.2 if name == "weight_VH" else 1.02
        assert error(tensor, exact[name]) <= allowed * error(theirs[name], exact[name]) + 1e-6, name


def test_autocast_computes_in_its_format_and_hands_out_float32(way: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = results(together, inputs(torch.float32, bias=True), Finish())
        wanted = results(plain, inputs(torch.float32, bias=True), Finish())
    for name, tensor in made.items():
        assert tensor.dtype == torch.float32
        assert error(tensor, wanted[name]) < 1e-2, name


def test_nothing_is_computed_for_what_is_frozen(way: str) -> None:
    given = inputs(torch.float32, bias=True)
    wanted = results(together, given, Finish())["hidden_NH"]
    frozen = {**inputs(torch.float32, bias=True), "weight_VH": given["weight_VH"].detach(), "bias_V": given["bias_V"].detach()}
    assert results(together, frozen, Finish())["hidden_NH"].equal(wanted)
    assert frozen["weight_VH"].grad is None
    with torch.no_grad():
        assert float(together(given, Finish())) == pytest.approx(float(plain(given, Finish())), rel=1e-6)


def test_the_logits_are_never_all_there(way: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest.append(result.untyped_storage().nbytes())
            return result

    with Watch():
        together(inputs(torch.float32, bias=False), Finish()).backward()
    assert 50 * VOCABULARY * 4 <= max(largest) < ROWS * VOCABULARY * 4 / 2


def test_no_rows_give_no_loss_and_no_gradient(way: str) -> None:
    given = inputs(torch.bfloat16, bias=False)
    value = linear_cross_entropy(given["hidden_NH"][:0], given["weight_VH"], targets()[:0])
    value.backward()
    assert float(value.detach()) == 0
    assert float(given["weight_VH"].grad.abs().max()) == 0  # type: ignore[union-attr]


def test_what_is_not_finite_stays_visible(way: str) -> None:
    given = inputs(torch.float32, bias=False)
    given["hidden_NH"].data[3, 3] = float("nan")
    assert torch.isnan(together(given, Finish()))


def test_a_target_outside_of_the_vocabulary_is_an_error(way: str) -> None:
    given = inputs(torch.float32, bias=False)
    with pytest.raises((IndexError, RuntimeError), match=r"vocabulary|out of bounds"):
        linear_cross_entropy(given["hidden_NH"], given["weight_VH"], targets() + VOCABULARY)


def test_gradients_are_handed_out_once(way: str) -> None:
    value = together(inputs(torch.float32, bias=False), Finish())
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        value.backward()


def test_what_comes_after_the_loss_counts(way: str) -> None:
    found, wanted = inputs(torch.float32, bias=True), inputs(torch.float32, bias=True)
    together(found, Finish()).backward()
    (together(wanted, Finish()) * 3).backward()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.grad * 3, wanted[name].grad)  # type: ignore[operator]
