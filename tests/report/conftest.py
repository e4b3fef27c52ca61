"""Plans and runs made by hand, so that no model and no data is needed to show them."""

from __future__ import annotations

import dataclasses
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from sartor.data import DataSummary
from sartor.data.summary import Lengths
from sartor.job import from_mapping
from sartor.machine import Device, HostMemory, Machine
from sartor.methods import MethodTraits
from sartor.model import Anatomy
from sartor.plan import Plan, Rejected, Strategy
from sartor.predict import KINDS, MemoryForecast, Peak
from sartor.predict.timeline import Section, Timeline
from sartor.step import Precision
from sartor.train import Answer, MemoryOutcome, Run

GIB = 2**30


def make_machine(*, accelerators: int = 0) -> Machine:
    host = HostMemory(total_bytes=16 * GIB, available_bytes=12 * GIB)
    devices = tuple(
        Device(kind="cuda", index=i, name="NVIDIA H200", total_bytes=139 * GIB, available_bytes=138 * GIB)
        for i in range(accelerators)
    )
    cpu = Device(kind="cpu", index=0, name="A Processor", total_bytes=16 * GIB, available_bytes=12 * GIB)
    return Machine(
        device=devices[0] if devices else cpu,
        accelerators=devices,
        host=host,
        cpu_name="A Processor",
        cores=8,
        threads=8,
        instruction_sets=("avx2", "avx512f"),
    )


def make_timeline(peak_bytes: int = 8 * GIB) -> Timeline:
    """Weights that stay, activations that come and go; the peak in three quarters of the step."""
    weights, rest = 3 * peak_bytes // 8, peak_bytes // 8
    peak = (weights, rest, 2 * rest, peak_bytes - weights - 3 * rest)
    return Timeline(
        kinds=KINDS,
        moments=(0.0, 0.4, 0.75, 0.9, 1.0),
        live_bytes=(
            (weights, 0, 2 * rest, 0),
            (weights, 0, 2 * rest, rest),
            peak,
            (weights, rest, 2 * rest, 0),
            (weights, 0, 0, 0),
        ),
        sections=(
            Section(name="forward", first=0.0, end=0.4),
            Section(name="loss and backward", first=0.4, end=0.95),
            Section(name="update", first=0.95, end=1.0),
        ),
        peak=2,
        peak_module="model.layers.*.mlp",
        off_by_bytes=0,
    )


def make_forecast(verdict: Any = "fits", *, available: int = 12 * GIB) -> MemoryForecast:
    parts = {"weights": 3 * GIB, "gradients": 1 * GIB, "optimizer": 2 * GIB, "activations": 2 * GIB}
    if verdict == "cannot say":
        return MemoryForecast(
            verdict=verdict,
            reason="this model's step cannot be traced (ValueError: <odd>)",
            peak=None,
            allocated_bytes=None,
            active_bytes=None,
            reserved_bytes=None,
            process_bytes=None,
            baseline_bytes=GIB,
            available_bytes=available,
            tight_share=0.8,
            trace_seconds=0.1,
        )
    return MemoryForecast(
        verdict=verdict,
        reason=f"needs 9.00 GiB of {available / GIB:.1f} GiB",
        peak=Peak(total_bytes=8 * GIB, phase="step 2: forward and backward", by_kind=parts),
        allocated_bytes=8 * GIB,
        active_bytes=None,
        reserved_bytes=None,
        process_bytes=9 * GIB,
        baseline_bytes=GIB,
        available_bytes=available,
        tight_share=0.8,
        trace_seconds=0.8,
        timeline=make_timeline(),
    )


def make_plan(**changes: Any) -> Plan:
    job = from_mapping(
        {
            "model": "models/small",
            "data": "train.jsonl",
            "training": {"learning_rate": 2e-4, "global_batch": 16},
            "output": "runs/first",
        }
    )
    strategy = Strategy(
        device="cpu",
        threads=8,
        precision=Precision.of("float32"),
        packing=True,
        row_capacity=512,
        micro_batch=8,
        recompute=False,
        attention=None,
    )
    large = dataclasses.replace(strategy, micro_batch=16)
    data = DataSummary(
        format="alpaca",
        recognised="recognised by the columns instruction, output",
        template="chatml",
        samples=860,
        held_out_samples=40,
        tokens=143_200,
        trained_tokens=88_300,
        truncated=12,
        dropped=0,
        untrained=3,
        max_length=512,
        lengths=Lengths(edges=(0, 200, 400, 600), counts=(500, 300, 60), quantiles={"50%": 166, "longest": 512}),
        notes=(),
        cached=False,
        seconds=0.4,
    )
    plan = Plan(
        job=job,
        machine=make_machine(),
        strategy=strategy,
        forecast=make_forecast(),
        traits=MethodTraits(learning_rate=2e-4, virtual_tokens=0, packing=True, recompute=True, adapter=True),
        anatomy=Anatomy(stacks=(), embeddings=None, head=None, parameters=1_240_000_000, tied=True),
        trained_parameters=11_300_000,
        data=data,
        total_steps=161,
        rejected=(Rejected(strategy=large, reason="does not fit: needs 14.2 GiB of 12.0 GiB"),),
        notes=("the tokenizer has no chat template: chatml is used",),
    )
    return dataclasses.replace(plan, **changes)


def make_run(**changes: Any) -> Run:
    answers = tuple(
        Answer(
            prompt=f"Anna is {n} years old and lives in Bern.",
            reference=f'{{"name": "Anna", "age": {n}, "city": "Bern"}}',
            before="Anna went to the market and bought a loaf of bread.",
            after=f'{{"name": "Anna", "age": {n if n % 3 else 0}, "city": "Bern"}}',
        )
        for n in range(30, 42)
    )
    run = Run(
        folder="runs/first",
        status="finished",
        steps=161,
        total_steps=161,
        epochs=3.0,
        seconds=83.4,
        tokens=429_600,
        trained_tokens=264_900,
        tokens_per_second=5151.0,
        first_loss=4.61,
        last_loss=0.42,
        first_eval_loss=4.512,
        last_eval_loss=0.513,
        memory=MemoryOutcome(
            forecast_bytes=9 * GIB,
            measured_bytes=round(9.2 * GIB),
            measured_name="peak resident memory of the process",
            error_percent=(9 / 9.2 - 1) * 100,
        ),
        checkpoint="checkpoint-161",
        answers=answers,
        exact_match_before=0.0,
        exact_match_after=0.67,
        versions={"python": "3.11.2", "sartor": "0.1.0", "torch": "2.11.0"},
    )
    return dataclasses.replace(run, **changes)


def make_metrics(steps: int = 161, *, every: int = 40) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl with a falling, noisy loss."""
    noise, lines = random.Random(0), [{"step": 0, "eval_loss": 4.512, "eval_tokens": 900}]
    for step in range(1, steps + 1):
        loss = 0.45 + 4.1 * math.exp(-step / (steps / 6)) + noise.gauss(0, 0.12)
        speed = 5200 + noise.gauss(0, 200) - (3000 if step == 1 else 0)
        lines.append({"step": step, "loss": loss, "learning_rate": 2e-4, "tokens_per_second": speed, "seconds": step * 0.5})
        if step % every == 0 or step == steps:
            lines.append({"step": step, "eval_loss": 0.5 + 4 * math.exp(-step / (steps / 6)), "eval_tokens": 900})
    return lines


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The makers above, each taking changes."""
    return SimpleNamespace(
        plan=make_plan,
        run=make_run,
        metrics=make_metrics,
        forecast=make_forecast,
        machine=make_machine,
        timeline=make_timeline,
    )


@pytest.fixture
def plan() -> Plan:
    return make_plan()


@pytest.fixture
def run() -> Run:
    return make_run()
