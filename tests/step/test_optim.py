"""The learning rate and what decays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sartor.errors import JobError
from sartor.job.schema import PrecisionJob, TrainingJob
from sartor.step import Precision, learning_rate
from sartor.step.optim import make_optimizer


def rates(**options: object) -> list[float]:
    job = TrainingJob(**options)  # type: ignore[arg-type]
    return [learning_rate(step, 100, job, peak=1.0) for step in range(100)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warms_up_then_follows_its_schedule(schedule: str) -> None:
    curve = rates(schedule=schedule, warmup=0.1)
    assert 0 < curve[0] < 0.2
    assert curve[:10] == sorted(curve[:10])
    assert max(curve) == pytest.approx(1.0)
    assert curve[10:] == sorted(curve[10:], reverse=True)
    assert (curve[-1] == 1.0) == (schedule == "constant")


def test_warm_up_in_steps_and_a_final_rate() -> None:
    curve = rates(schedule="linear", warmup=5, final_rate=0.1)
    assert curve[5] == pytest.approx(1.0)
    assert 0.1 <= curve[-1] < 0.12


def test_only_matrices_decay() -> None:
    layer = nn.Linear(3, 3)
    optimizer = make_optimizer(dict(layer.named_parameters()), TrainingJob(weight_decay=0.5))
    decays = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert decays == {id(layer.weight): 0.5, id(layer.bias): 0.0}


def test_precision_modes() -> None:
    assert Precision.resolve(PrecisionJob(), "cpu").mode == "float32"
    assert Precision.resolve(PrecisionJob(), "cuda").mode == "bf16-mixed"
    assert Precision.resolve(PrecisionJob(), "cpu", instruction_sets=("avx2", "avx512_bf16")).mode == "bf16-master"
    assert Precision.resolve(PrecisionJob(), "cpu", instruction_sets=("amx_bf16",), optimizer="sgd").mode == "float32"
    assert Precision.of("bf16-mixed").load_dtype(adapter=True) == torch.bfloat16
    assert Precision.of("bf16-master").load_dtype(adapter=True) == torch.bfloat16
    assert Precision.of("bf16-master").load_dtype(adapter=False) == torch.float32
    assert Precision.of("bf16-mixed").load_dtype(adapter=False) == torch.float32
    assert Precision.of("bf16").load_dtype(adapter=False) == torch.bfloat16


@pytest.mark.parametrize(
    ("job", "kind", "optimizer", "what"),
    [
        (PrecisionJob(mode="bf16-master"), "neuron", "adamw", "kind neuron"),
        (PrecisionJob(mode="bf16-master"), "cpu", "sgd", "the job's optimizer is sgd"),
        (PrecisionJob(mode="bf16-master"), "cuda", "adamw-8bit", "the job's optimizer is adamw-8bit"),
        (PrecisionJob(mode="bf16-master", trained="float32"), "cpu", "adamw", "decides all formats"),
    ],
)
def test_masters_in_two_halves_are_for_adamw_on_a_cpu(job: PrecisionJob, kind: str, optimizer: str, what: str) -> None:
    with pytest.raises(JobError, match=what):
        Precision.resolve(job, kind, optimizer=optimizer)


@pytest.mark.parametrize(
    ("mode", "kind", "optimizer", "what"),
    [
        ("bf16", "cuda", "adamw", "kind cuda"),
        ("bf16", "cpu", "sgd", "the job's optimizer is sgd"),
        ("bf16-master", "cpu", "adamw", "keep what rounding loses"),
        ("float32", "cpu", "adamw-8bit", "what trains is float32"),
    ],
)
def test_where_weights_are_not_rounded_by_chance(mode: Any, kind: str, optimizer: str, what: str) -> None:
    with pytest.raises(JobError, match=what):
        Precision.resolve(PrecisionJob(mode=mode, rounding="stochastic"), kind, optimizer=optimizer)
    made = Precision.resolve(PrecisionJob(rounding="stochastic"), "cpu", optimizer="adamw-8bit")
    assert made.describe() == "bf16, rounded stochastically"


def test_formats_given_one_by_one() -> None:
    job = PrecisionJob(weights="float16", compute="as-stored")
    precision = Precision.resolve(job, "cuda")
    assert (precision.weights, precision.trained, precision.compute) == ("float16", "float32", "as-stored")
    assert precision.load_dtype(adapter=True) == torch.float16
    assert precision.needs_loss_scaling
    assert not Precision.of("bf16-mixed").needs_loss_scaling


@pytest.mark.parametrize("name", ["adamw", "adamw-foreach", "sgd"])
def test_every_optimizer_takes_a_step(name: str) -> None:
    layer = nn.Linear(3, 3)
    before = layer.weight.detach().clone()
    optimizer = make_optimizer(dict(layer.named_parameters()), TrainingJob(optimizer=name))  # type: ignore[arg-type]
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
