"""Updates by slices, and updates that memory runs out in: the same to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sartor
from sartor.errors import UsageError
from sartor.kernels import compact
from sartor.kernels.adam import MasterAdamW
from sartor.kernels.compact import CompactAdamW
from sartor.model.rows import find_rows
from sartor.placement import DiskTier, Engine
from sartor.placement.optimizer import StreamedOptimizer
from sartor.plan import table
from sartor.plan.table import Sizes, uniform

RATES: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
OPTIMIZERS: dict[str, tuple[torch.dtype, Callable[[Any], torch.optim.Optimizer]]] = {
    "fused": (torch.float32, lambda p: torch.optim.AdamW(p, fused=True, **RATES)),
    "amsgrad": (torch.float32, lambda p: torch.optim.Adam(p, amsgrad=True, **RATES)),
    "momentum": (torch.float32, lambda p: torch.optim.SGD(p, momentum=0.9, **RATES)),
    "masters": (torch.bfloat16, lambda p: MasterAdamW(p, **RATES)),
    "8-bit": (torch.float32, lambda p: CompactAdamW(p, eight_bit=True, **RATES)),
    "8-bit, stochastic": (torch.bfloat16, lambda p: CompactAdamW(p, eight_bit=True, rounding_seed=1, **RATES)),
}


class Words(nn.Module):
    """Embeddings that are larger than all else."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(160, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.head = nn.Linear(64, 1)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x).float().square().mean()


def backward(model: nn.Module, step: int) -> None:
    model(torch.randint(0, 160, (4, 9), generator=torch.Generator().manual_seed(step))).backward()


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "SLICE", 2048)
    monkeypatch.setattr(compact, "PART", 512)
    monkeypatch.setattr(compact, "SMALLEST", 1024)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_larger_than_the_budget_is_updated_by_slices(tmp_path: Path, small_slices: None, name: str) -> None:
    torch.manual_seed(0)
    dtype, make = OPTIMIZERS[name]
    model = Words().to(dtype)
    other = copy.deepcopy(model)
    optimizer = make(model.parameters())
    rows = {"budget": 1, "folder": tmp_path, "lower": "host" if "8-bit" in name else "disk"}  # which has pages
    with pytest.raises(UsageError, match="together in memory") as caught:
        sartor.prepare(copy.deepcopy(other), make(list(other.parameters())), **rows)  # type: ignore[arg-type]
    rows["budget"] = least = int(caught.value.remedy.split()[0].removeprefix("budget="))
    whole = (2 if dtype == torch.bfloat16 else 4) * 2 * model.embeddings.weight.numel()
    other, placed = sartor.prepare(other, make(other.parameters()), **rows)  # type: ignore[arg-type]
    for step in range(4):
        for one, its in ((model, optimizer), (other, placed)):
            backward(one, step)
            its.step()
            its.zero_grad()
        if step == 2:
            assert 0 < placed.engine.gauge.peak_bytes <= least
            placed.load_state_dict(placed.state_dict())
    kept = sum(value.nbytes for value in optimizer.state[model.embeddings.weight].values())
    assert whole < least < 0.9 * (whole + kept), "weights and gradients of the embeddings, and a slice of their state"
    for (key, value), moved in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, moved), key
    states = optimizer.state_dict()["state"], placed.state_dict()["state"]
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(states[1][n][k])) for n in states[0] for k, v in states[0][n].items()
    )


@pytest.mark.parametrize("fails", range(4))
@pytest.mark.parametrize("first", [True, False])
def test_an_update_goes_on_where_memory_ran_out(tmp_path: Path, fails: int, first: bool) -> None:
    """At one of its rows: with everything on disk from then on."""
    torch.manual_seed(0)
    model = Words()
    other = copy.deepcopy(model)
    plain, optimizer = (torch.optim.AdamW(one.parameters(), fused=True, **RATES) for one in (model, other))
    rows = find_rows(other)
    sizes = [Sizes.of(row) for row in rows]
    everything = uniform(sizes, "disk")
    some = table.Table(rows=tuple(table.RowPlaces(name=row.name, state="disk") for row in everything.rows))
    engine = Engine(other, rows, some, {"disk": DiskTier(tmp_path)})
    streamed = StreamedOptimizer(engine, optimizer)
    calls = 0

    def short(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1 + fails + (0 if first else 4):
            raise MemoryError("can't allocate memory")

    optimizer.register_step_pre_hook(short)

    def halve(gradients: Any, _: torch.optim.Optimizer) -> None:
        for gradient in gradients:
            gradient.mul_(0.5)

    for step in range(2):
        backward(model, step)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(0.5)
        plain.step()
        plain.zero_grad()
        backward(other, step)
        try:
            streamed.step(halve)
        except MemoryError:
            assert not streamed.torn
            engine.clear()
            engine.rearrange(everything, limit=engine.table.row_bytes(sizes), update_limit=None, keep_gradients=True)
            streamed.rearranged()
            streamed.step(halve)
    assert calls == 9, "every row once in each of two steps, and once more"
    engine.detach()
    for one, moved in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, moved)


def test_what_has_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Words()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = find_rows(model)
    engine = Engine(model, rows, uniform([Sizes.of(row) for row in rows], "disk"), {"disk": DiskTier(tmp_path)})
    streamed = StreamedOptimizer(engine, optimizer)

    def late(*_: Any) -> None:
        raise MemoryError("can't allocate memory")

    optimizer.register_step_post_hook(late)
    backward(model, 0)
    with pytest.raises(MemoryError):
        streamed.step()
    assert streamed.torn
