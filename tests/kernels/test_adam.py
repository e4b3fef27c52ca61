"""Masters in two halves lose nothing: AdamW on them is PyTorch's AdamW in float32, bit by bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sartor.kernels import adam, native
from sartor.kernels.adam import MasterAdamW, gradient_norm, merge, split

RATES = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}


@pytest.fixture(params=["compiled", "operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "operators":
        monkeypatch.setattr(adam, "library", lambda: None)
        monkeypatch.setattr(adam, "PIECE", 1000)
    elif native.library() is None:
        pytest.skip(native.missing())
    return str(request.param)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64))
def test_every_float32_comes_back(bits: list[int]) -> None:
    master = torch.from_numpy(np.array(bits, dtype=np.int32)).view(torch.float32)
    weight, residual = split(master)
    assert merge(weight, residual).view(torch.int32).equal(master.view(torch.int32))
    finite = master.isfinite()
    wanted = master[finite].to(torch.bfloat16).float()
    assert bool(((weight[finite].float() - master[finite]).abs() == (wanted - master[finite]).abs()).all() | wanted.isinf().any())


def weights(*, odd: bool = True) -> list[Tensor]:
    """More elements than a thread takes at once, and fewer. `odd`: no multiple of what a vector register holds."""
    torch.manual_seed(0)
    return [torch.randn(70, 1001 if odd else 1024), torch.randn(7 if odd else 64)]


def run(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int, dtype: torch.dtype, *, first: int = 0
) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
            parameter.grad_dtype = dtype
            parameter.grad = gradient.to(dtype)
        optimizer.step()


def masters(start: list[Tensor]) -> tuple[MasterAdamW, list[nn.Parameter]]:
    halves = [split(tensor) for tensor in start]
    parameters = [nn.Parameter(weight) for weight, _ in halves]
    residuals: dict[Tensor, Tensor] = {p: residual for p, (_, residual) in zip(parameters, halves, strict=True)}
    return MasterAdamW(parameters, weight_decay=0.1, start=residuals, **RATES), parameters


def merged(optimizer: MasterAdamW, parameters: list[nn.Parameter]) -> list[Tensor]:
    return [merge(p.detach(), optimizer.state[p]["residual"]) for p in parameters]


@pytest.mark.parametrize("odd", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_run_is_that_of_float32(way: str, dtype: torch.dtype, odd: bool) -> None:
    wanted = [nn.Parameter(tensor.clone()) for tensor in weights(odd=odd)]
    kernel = {"fused": True} if way == "compiled" else {"foreach": False}
    run(torch.optim.AdamW(wanted, weight_decay=0.1, **RATES, **kernel), wanted, 20, torch.float32)  # type: ignore[arg-type]
    optimizer, parameters = masters(weights(odd=odd))
    run(optimizer, parameters, 20, dtype)
    for made, tensor, parameter in zip(merged(optimizer, parameters), wanted, parameters, strict=True):
        # To the bit where this was measured (x86 with fused multiply-add). PyTorch's kernel rounds the rest of a tensor, which
        # fills no register, otherwise than all before; so may another compiler.
        torch.testing.assert_close(made, tensor.detach(), rtol=2e-6, atol=1e-6)
        if not odd and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            assert made.equal(tensor.detach())
        assert float((parameter.detach().float() - made).abs().max()) <= 2**-8 * float(made.abs().max())


def test_clipping_is_a_factor(way: str) -> None:
    (plain, one), (scaled, other) = masters(weights()), masters(weights())
    for parameter, twin in zip(one, other, strict=True):
        parameter.grad_dtype = torch.float32
        twin.grad = torch.ones_like(twin)
        parameter.grad = torch.full_like(parameter, 0.3, dtype=torch.float32)
    scaled.scale = torch.tensor(0.3)
    plain.step()
    scaled.step()
    assert scaled.scale is None
    assert all(a.equal(b) for a, b in zip(merged(plain, one), merged(scaled, other), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_norm_is_that_of_float64(way: str, dtype: torch.dtype) -> None:
    gradients = [tensor.to(dtype) for tensor in weights()]
    wanted = torch.linalg.vector_norm(torch.cat([gradient.double().flatten() for gradient in gradients]))
    assert float(gradient_norm(gradients)) == pytest.approx(float(wanted), rel=1e-6)


def test_threads_do_not_change_the_norm() -> None:
    gradients, norms = [weights()[0]], []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        norms.append(float(gradient_norm(gradients)))
    torch.set_num_threads(1)
    assert len(set(norms)) == 1


def test_saved_and_loaded_goes_on_exactly(way: str) -> None:
    whole, of_whole = masters(weights())
    run(whole, of_whole, 8, torch.bfloat16)
    first, of_first = masters(weights())
    run(first, of_first, 5, torch.bfloat16)
    saved = copy.deepcopy(first.state_dict())
    parameters = [nn.Parameter(parameter.detach().clone()) for parameter in of_first]
    second = MasterAdamW(parameters)
    second.load_state_dict(saved)
    assert {value.dtype for value in second.state[parameters[0]].values()} == {torch.float32, torch.int16}
    run(second, parameters, 3, torch.bfloat16, first=5)
    assert all(a.equal(b) for a, b in zip(merged(whole, of_whole), merged(second, parameters), strict=True))


def test_float32_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        MasterAdamW([nn.Parameter(torch.zeros(3))])
