"""Products with frozen weights in int8: near the exact ones, traced as they run, refused where they do not belong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sartor
from sartor.errors import JobError
from sartor.job import from_mapping
from sartor.kernels import int8
from sartor.machine import probe
from sartor.machine.calibration import CALIBRATION_VERSION, Calibration
from sartor.plan.products import frozen_products
from sartor.predict.rates import CalibratedRates
from sartor.train import read_metrics
from support import device_rates


def passed(layer: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_(True)
    y = layer(x)
    y.backward(gradient)
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_are_near_the_exact_ones(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 160, dtype=dtype).requires_grad_(False)
    x, gradient = torch.randn(3, 20, 96, dtype=dtype), torch.randn(3, 20, 160, dtype=dtype)
    x[0, 0] = 0  # a row without a scale
    for ours, exact in zip(passed(int8.Int8Linear(layer), x, gradient), passed(layer, x, gradient), strict=True):
        assert ours.dtype == exact.dtype
        assert ours.shape == exact.shape
        assert float((ours - exact).float().norm() / exact.float().norm()) < 0.02
        assert ours.isfinite().all()


@pytest.mark.parametrize("factor", [None, torch.linspace(0.1, 2, 200)])
def test_without_a_compiler_it_is_the_same(monkeypatch: pytest.MonkeyPatch, factor: Tensor | None) -> None:
    torch.manual_seed(0)
    x, sums = torch.randn(17, 200, dtype=torch.bfloat16), torch.randint(-9999, 9999, (17, 200), dtype=torch.int32)
    rounded, scale = int8.quantise_rows(x, factor)
    made = int8.dequantise(sums, scale, factor, torch.bfloat16)
    monkeypatch.setattr(int8, "library", lambda: None)
    other, other_scale = int8.quantise_rows(x, factor)
    assert int((rounded.int() - other.int()).abs().max()) <= 1  # halves, where 1 / scale is rounded otherwise
    assert float((rounded != other).float().mean()) < 0.01
    torch.testing.assert_close(scale, other_scale)
    torch.testing.assert_close(made, int8.dequantise(sums, scale, factor, torch.bfloat16), rtol=1e-2, atol=1e-6)


def fast(**changes: Any) -> sartor.Machine:
    return dataclasses.replace(probe(), instruction_sets=("avx512_vnni",), **changes)


def test_jobs_that_cannot_have_them() -> None:
    tree = {"model": "unused", "data": "unused", "strategy": {"frozen_products": "int8"}}
    assert "not exact" in frozen_products(from_mapping(tree), fast())
    with pytest.raises(JobError, match="the method is full"):
        frozen_products(from_mapping({**tree, "method": "full"}), fast())
    with pytest.raises(JobError, match="instructions"):
        frozen_products(from_mapping(tree), dataclasses.replace(fast(), instruction_sets=("avx2",)))


def check_products(plan: sartor.Plan) -> None:
    """The trace has them in int8, and they take the time of the calibration's rates for int8."""
    products = [
        (segment.kind, operation)
        for segment, operation, _ in plan.forecast.stages[0].step()
        if operation.family == "matmul" and operation.dtype == "int8"
    ]
    assert {kind for kind, _ in products} == {"forward", "backward"}
    rates = device_rates()
    fast = tuple(dataclasses.replace(one, dtype="int8", flops_per_second=4 * one.flops_per_second) for one in rates.matmul)
    with_int8 = dataclasses.replace(rates, matmul=(*rates.matmul, *fast))
    known, unknown = (
        CalibratedRates(Calibration(version=CALIBRATION_VERSION, key="", measured="", seconds=1.0, device=device))
        for device in (with_int8, rates)
    )
    assert all(known.seconds(operation, kind) < unknown.seconds(operation, kind) for kind, operation in products)


def test_a_run_is_near_the_exact_one_and_forecast_with_smaller_weights(job_tree: dict[str, Any]) -> None:
    if not set(probe().instruction_sets) & set(int8.FAST_INT8):
        pytest.skip("this CPU has no fast int8 products")
    output = job_tree.pop("output")
    job_tree |= {"method": "lora", "precision": "float32"}
    trees = {
        mode: {**job_tree, "strategy": {"micro_batch": 4, "frozen_products": mode}, "output": f"{output}-{mode}"}
        for mode in ("exact", "int8")
    }
    plans = {mode: sartor.plan(tree) for mode, tree in trees.items()}
    weights = {mode: plan.forecast.peak.by_kind["weights"] for mode, plan in plans.items() if plan.forecast.peak}
    assert weights["int8"] < 0.9 * weights["exact"]
    with pytest.raises(JobError, match=r"strategy\.placement"):
        sartor.plan({**trees["int8"], "strategy": {"frozen_products": "int8", "placement": "disk"}})
    assert any("not exact" in note for note in plans["int8"].notes)
    check_products(plans["int8"])
    for plan in plans.values():
        sartor.train(plan)
    losses = {
        mode: [line["loss"] for line in read_metrics(Path(tree["output"])) if "loss" in line] for mode, tree in trees.items()
    }
    assert losses["int8"] == pytest.approx(losses["exact"], rel=5e-3)
    assert losses["int8"] != losses["exact"]
