"""Processes that share memory: each updates its part, and all have what one process makes of the same gradients."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ranks import on_ranks
from sartor.job.schema import TrainingJob
from sartor.step import World
from sartor.step.optim import make_optimizer
from sartor.step.precision import Precision
from sartor.step.processes import GradientSum
from sartor.step.shared import memory_bytes, shared_memory
from sartor.step.step import TrainStep, share_step

SHAPES = {"matrix": (50, 37), "small": (30,), "sometimes": (10, 64), "never": (8, 8)}
STEPS = 3


class Bare(nn.ParameterDict):
    """A model that is nothing but parameters."""

    def get_input_embeddings(self) -> None:
        """It has none."""


def made(mode: str, optimizer: str) -> tuple[TrainStep, dict[str, nn.Parameter]]:
    """A step, and its parameters."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    precision, job = Precision.of(mode), TrainingJob(optimizer=optimizer, weight_decay=0.1)  # type: ignore[arg-type]
    precision.cast_trained(parameters)
    made_by = make_optimizer(parameters, job, precision=precision)
    return TrainStep(Bare(parameters), parameters, made_by, precision=precision, device_kind="cpu", clip_norm=0.5), parameters


def gradient(rank: int, step: int, name: str) -> Tensor | None:
    """Of one process: none of it has one for `never`, only the first for `sometimes`."""
    if name == "never" or (name == "sometimes" and rank):
        return None
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(100 * rank + 10 * step + len(name)))


def run(rank: int, ranks: int, mode: str, optimizer: str) -> dict[str, Any]:
    """Some steps of one of these processes; in two passes, of which the first one's gradients are zero."""
    step, parameters = made(mode, optimizer)
    share_step(step, World(rank, ranks))
    shared: Any = step.shared
    assert type(shared).__name__ == "SharedGradients"
    norms = []
    for number in range(STEPS):
        for factor in (0.0, 1.0):
            for name, parameter in parameters.items():
                if (own := gradient(rank, number, name)) is not None:
                    (parameter * (factor * own).to(parameter.dtype)).sum().backward()
        shared.finish()
        norms.append(float(step.clip()))
        step.update(1e-2)
    assert all(parameter.grad is None for parameter in parameters.values())
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    states = {name: {key: v.clone() for key, v in step.state_of(p).items()} for name, p in parameters.items()} if not rank else {}
    restored, others = made(mode, optimizer)
    share_step(restored, World(rank, ranks))
    for name, state in World(rank, ranks).lead(states).items():
        for key, value in state.items():
            restored.put_state(others[name], key, value)
    World(rank, ranks).sum(0.0)
    again = {name: restored.state_of(p) for name, p in others.items()} if not rank else {}
    same = all(torch.equal(again[name][key], value) for name, state in states.items() for key, value in state.items())
    return {"norms": norms, "weights": weights, "states": states, "restored": same, "own_bytes": shared.own_bytes}


def alone(ranks: int, mode: str, optimizer: str) -> dict[str, Any]:
    """One process with the sums of these gradients, rounded as they are."""
    step, parameters = made(mode, optimizer)
    norms = []
    for number in range(STEPS):
        for name, parameter in parameters.items():
            found = [own.to(parameter.dtype) for rank in range(ranks) if (own := gradient(rank, number, name)) is not None]
            if found:
                total = found[0].float()
                for more in found[1:]:
                    total = total + more
                parameter.grad = total.to(parameter.dtype)
        norms.append(float(step.clip()))
        step.update(1e-2)
    return {"norms": norms, "weights": parameters, "states": {name: step.state_of(p) for name, p in parameters.items()}}


@pytest.mark.parametrize(
    ("ranks", "mode", "optimizer"),
    [(2, "bf16-master", "adamw"), (3, "bf16-master", "adamw"), (3, "float32", "adamw"), (2, "float32", "sgd")],
)
def test_the_update_is_that_of_one_process(ranks: int, mode: str, optimizer: str) -> None:
    found, reference = on_ranks(ranks, run, ranks, mode, optimizer), alone(ranks, mode, optimizer)
    for one in found:
        assert one["norms"] == pytest.approx(reference["norms"], rel=1e-5)
        for name, weight in reference["weights"].items():
            assert torch.equal(one["weights"][name], found[0]["weights"][name])
            torch.testing.assert_close(one["weights"][name], weight.detach(), rtol=0, atol=1e-6)
    states = found[0]["states"]
    assert {name: state.keys() for name, state in states.items()} == {n: s.keys() for n, s in reference["states"].items()}
    for name, state in reference["states"].items():
        for key, value in state.items():
            assert states[name][key].dtype == value.dtype
            if key != "residual":
                torch.testing.assert_close(states[name][key], value, rtol=1e-5, atol=1e-7)
    assert found[0]["restored"]


def test_state_is_shared_out() -> None:
    """What all processes have of it together is one process's."""
    found = on_ranks(2, run, 2, "bf16-master", "adamw")
    elements = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    gradients = 2 * elements
    assert sum(one["own_bytes"] for one in found) == 2 * gradients + (4 + 4 + 2) * elements


def one_without(rank: int) -> str:
    """The last process has no such memory; the first one has."""
    step, _ = made("float32", "adamw")
    if rank:
        step.parameters["more"] = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    share_step(step, World(rank, 2))
    return type(step.shared).__name__


def test_where_memory_cannot_be_shared_all_send() -> None:
    assert on_ranks(2, one_without) == [GradientSum.__name__] * 2


def leftovers(rank: int) -> int:
    """Files that this process holds open in memory, after it has let go of what it shared."""
    step, parameters = made("float32", "adamw")
    memory = shared_memory(World(rank, 2), memory_bytes(parameters, step.optimizer, 2))
    assert memory is not None
    memory[rank] = 1
    World(rank, 2).sum(0.0)
    assert memory[:2].tolist() == [1, 1]
    del memory
    gc.collect()
    return sum("sartor-" in str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())


def test_nothing_is_left_of_shared_memory() -> None:
    assert on_ranks(2, leftovers) == [0, 0]
