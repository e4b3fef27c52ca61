"""Moments in 8 bits and weights rounded by chance: close to AdamW in float32, right on average, and the same again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sartor.kernels import compact
from sartor.kernels.adam import merge, split
from sartor.kernels.compact import BLOCK, SMALLEST, CompactAdamW, decode, encode, moments_bytes, round_by_chance

RATES = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("signed", [True, False])
def test_what_is_coded_comes_back_nearly(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(10 * BLOCK + 7, generator=generator) * torch.logspace(-8, 8, 10 * BLOCK + 7)
    values = values if signed else values.square()
    values[BLOCK : 2 * BLOCK] = 0.0
    coded, scales = encode(values, signed=signed)
    again = decode(coded, scales, signed=signed)
    assert (coded.dtype, coded.shape, len(scales)) == (torch.uint8, values.shape, 11)
    largest = scales.repeat_interleave(BLOCK)[: len(values)]
    assert bool(((again - values).abs() <= 0.04 * largest).all())
    near = values.abs() > 0.1 * largest  # where half of the codes are
    assert float(((again - values).abs() / values.abs())[near].max()) < 0.08
    assert bool((again[BLOCK : 2 * BLOCK] == 0).all())
    if not signed:
        assert bool(((again == 0) == (values == 0)).all()), "a small second moment must not vanish"


def test_stochastic_rounding_is_right_on_average_where_the_nearest_stalls() -> None:
    """A thousand updates of a hundredth of what bfloat16 tells apart."""
    update, steps = 2.0**-7 / 100, 1000
    nearest, by_chance = torch.ones(4096, dtype=torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        nearest = (nearest.float() + update).to(torch.bfloat16)
        by_chance = round_by_chance(*split(by_chance.float() + update), generator)
    assert bool((nearest == 1).all())
    assert float(by_chance.float().mean()) == pytest.approx(1 + steps * update, rel=1e-3)


def weights() -> list[Tensor]:
    """More than one part and no whole number of blocks; too small for 8 bits."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(70, 1001, generator=generator), torch.randn(65, generator=generator)]


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def made(dtype: torch.dtype, *, masters: bool = False, **options: bool | int | None) -> tuple[CompactAdamW, list[nn.Parameter]]:
    halves = [split(tensor) for tensor in weights()]
    parameters = [
        nn.Parameter(tensor if dtype == torch.float32 else half) for tensor, (half, _) in zip(weights(), halves, strict=True)
    ]
    start: dict[Tensor, Tensor] = {p: low for p, (_, low) in zip(parameters, halves, strict=True)} if masters else {}
    return CompactAdamW(parameters, masters=masters, start=start, **options, **RATES), parameters  # type: ignore[arg-type]


def test_float32_moments_without_chance_are_adamw() -> None:
    optimizer, parameters = made(torch.float32)
    plain = [nn.Parameter(tensor) for tensor in weights()]
    run(optimizer, parameters, range(5))
    run(torch.optim.AdamW(plain, **RATES, fused=True), plain, range(5))  # type: ignore[arg-type]
    for one, other in zip(parameters, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "masters"), [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_moments_in_8_bits_lead_nearly_as_far(dtype: torch.dtype, masters: bool) -> None:
    seed = None if masters or dtype == torch.float32 else 0
    optimizer, parameters = made(dtype, masters=masters, eight_bit=True, rounding_seed=seed)
    plain = [nn.Parameter(tensor) for tensor in weights()]
    run(optimizer, parameters, range(30))
    run(torch.optim.AdamW(plain, **RATES), plain, range(30))  # type: ignore[arg-type]
    for one, wanted, start in zip(parameters, plain, weights(), strict=True):
        state = optimizer.state[one]
        kept = sum(value.nbytes for key, value in state.items() if key.startswith("exp_avg"))
        assert kept == moments_bytes(one.numel(), eight_bit=True)
        assert (state["exp_avg"].dtype == torch.uint8) == (one.numel() >= SMALLEST)
        values = merge(one.detach(), state["residual"]) if masters else one.detach().float()
        other = wanted.detach()
        noise = 0.05 if seed is None else 0.2  # what bfloat16 tells apart is as large as a step
        assert float((values - other).norm() / (other - start).norm()) < noise


@pytest.mark.parametrize("masters", [True, False])
def test_it_goes_on_as_if_it_had_not_stopped(masters: bool) -> None:
    options = {"eight_bit": True, "rounding_seed": None if masters else 3}
    whole, of_whole = made(torch.bfloat16, masters=masters, **options)
    run(whole, of_whole, range(4))
    first, of_first = made(torch.bfloat16, masters=masters, **options)
    run(first, of_first, range(2))
    second, of_second = made(torch.bfloat16, masters=masters, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for one, other in zip(of_second, of_first, strict=True):
        one.data = other.data.clone()
    run(second, of_second, range(2, 4))
    assert all(map(torch.equal, of_whole, of_second))
    other_seed, of_other = made(torch.bfloat16, masters=masters, eight_bit=True, rounding_seed=None if masters else 4)
    run(other_seed, of_other, range(4))
    assert torch.equal(of_other[0], of_whole[0]) == masters, "another seed rounds otherwise"


def test_weights_in_any_order_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    square = weights()[0][:64, :64].contiguous()
    straight, turned, parts = map(nn.Parameter, (square.clone(), square.T.contiguous().T, square.clone()))
    for parameter in (straight, turned):
        run(CompactAdamW([parameter], eight_bit=True, **RATES), [parameter], range(2))  # type: ignore[arg-type]
    assert not turned.is_contiguous()
    assert torch.equal(straight, turned)
    monkeypatch.setattr(compact, "PART", 512)
    run(CompactAdamW([parts], eight_bit=True, **RATES), [parts], range(2))  # type: ignore[arg-type]
    assert torch.equal(straight, parts)
