"""`prepare` in loops that know nothing of Sartor: plain PyTorch, and transformers' Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import sartor
from placement_cases import Case, run_case
from sartor.errors import ModelError, UsageError

KIB = 2**10


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=5, tie_word_embeddings=True, **sizes))


def ids(step: int) -> Tensor:
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: Any, *, accumulate: int = 2, steps: int = 3) -> list[Tensor]:
    """A plain loop, with everything that people do in one; losses and norms."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    losses = []
    for step in range(steps):
        for number in range(accumulate):
            batch = ids(accumulate * step + number)
            loss = model(input_ids=batch, labels=batch).loss / accumulate
            loss.backward()
            losses.append(loss.detach())
        losses.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, amsgrad=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("where", [{"policy": "host"}, {"policy": "disk", "activations": "disk"}, {"policy": "auto"}])
def test_a_plain_loop_is_the_same_to_the_bit(tmp_path: Path, name: str, where: dict[str, Any]) -> None:
    model = make_llama()
    other = copy.deepcopy(model)
    optimizer, other_optimizer = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](other.parameters())
    wanted = train(model, optimizer)
    whole = {"adamw": 16, "adam": 20, "momentum": 12}[name] * sum(parameter.numel() for parameter in model.parameters())
    budget = int(0.85 * whole)
    other, placed = sartor.prepare(other, other_optimizer, sample={"input_ids": ids(0)}, folder=tmp_path, budget=budget, **where)
    assert all(map(torch.equal, wanted, train(other, placed)))
    assert 0 < placed.engine.gauge.peak_bytes < budget
    for (key, value), saved in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, saved), key
    states = optimizer.state_dict()["state"], placed.state_dict()["state"]
    assert all(torch.equal(states[0][n][key], states[1][n][key]) for n in states[0] for key in states[0][n])
    placed.release()
    assert all(map(torch.equal, train(model, optimizer), train(other, other_optimizer)))


@pytest.mark.parametrize("seed", range(25))
def test_any_case_is_refused_or_runs_within_its_budget(tmp_path: Path, seed: int) -> None:
    run_case(Case.draw(seed), tmp_path)


def test_state_that_is_more_than_adams_is_expected_before_the_first_step(tmp_path: Path) -> None:
    """AMSGrad keeps three numbers an element: its row goes by slices from the first update on, or needs more than its budget."""
    case = Case.draw(108)
    assert (case.optimizer, case.policy) == ("amsgrad", "auto")
    outcome = run_case(case, tmp_path)
    assert outcome.refused
    assert outcome.measured_bytes == outcome.budget_bytes


class Odd(nn.Module):
    """Weights that are read without a call of their module, a module that is called twice, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.unused = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(self.first(x)))) * self.scale
        x = self.attention(x, x, x)[0]
        return (x @ self.first.weight.T).square().mean()


def test_a_model_with_odd_ways(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Odd()
    other = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    other, placed = sartor.prepare(other, torch.optim.AdamW(other.parameters(), lr=1e-2), policy="disk", folder=tmp_path)
    for step in range(3):
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(step))
        for one, its in ((model, optimizer), (other, placed)):
            its.zero_grad()
            one(x).backward()
            its.step()
    for (key, value), saved in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, saved), key


def test_the_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in torch.cat([ids(n) for n in range(8)])]
    model = make_llama()
    other = copy.deepcopy(model)
    finals = []
    for one, place in ((model, False), (other, True)):
        optimizer: Any = torch.optim.AdamW(one.parameters(), lr=1e-2)
        if place:
            one, optimizer = sartor.prepare(one, optimizer, policy="host")
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model=one, args=arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train()
        finals.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        one.save_pretrained(tmp_path / str(place))
    assert finals[0] == finals[1]
    assert len(finals[0]) == 3
    saved = [LlamaForCausalLM.from_pretrained(tmp_path / str(place)).state_dict() for place in (False, True)]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


def test_a_model_on_meta_is_streamed_from_its_files(tmp_path: Path) -> None:
    from accelerate import init_empty_weights

    model = make_llama()
    model.save_pretrained(tmp_path / "model")
    with init_empty_weights(include_buffers=False):
        empty = LlamaForCausalLM(model.config)
    empty.tie_weights()
    wanted = train(model, OPTIMIZERS["adamw"](model.parameters()))
    optimizer = OPTIMIZERS["adamw"](empty.parameters())
    empty, placed = sartor.prepare(empty, optimizer, policy="disk", folder=tmp_path, weights=tmp_path / "model")
    assert all(map(torch.equal, wanted, train(empty, placed)))
    with init_empty_weights(include_buffers=False):
        larger = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 6}))
    with pytest.raises(ModelError, match="lack"):
        sartor.prepare(larger, OPTIMIZERS["adamw"](larger.parameters()), policy="host", weights=tmp_path / "model")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = make_llama()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with pytest.raises(UsageError, match="do not fit"):
        sartor.prepare(model, optimizer, budget=10 * KIB)
    with pytest.raises(UsageError, match="budget"):
        sartor.prepare(model, optimizer)
    model, _ = sartor.prepare(model, optimizer, policy="host")
    with pytest.raises(UsageError, match="before"):
        model.load_state_dict(model.state_dict())


def test_what_is_away_can_be_read_and_written(tmp_path: Path) -> None:
    """As loops do that log, average or constrain weights between steps."""
    model = make_llama()
    other = copy.deepcopy(model)
    optimizer, inner = (OPTIMIZERS["adamw"](one.parameters()) for one in (model, other))
    other, placed = sartor.prepare(other, inner, policy="disk", folder=tmp_path)

    def between(one: Any, its: torch.optim.Optimizer) -> list[Any]:
        weight, head = one.model.layers[1].mlp.up_proj.weight, one.lm_head.weight
        view = weight.detach().T[1:3]
        seen = [
            weight.sum(),
            float(head.detach().norm()),
            view.clone(),
            weight[0] @ head[1].to(weight.dtype),
            (weight.data * 2).mean(),
        ]
        seen += [
            torch.cat([p.detach().flatten() for p in one.parameters()]).mean(),
            torch.stack(torch._foreach_norm([weight, head])),
        ]
        seen += [its.state[weight]["exp_avg"].sum(), weight.detach().numpy().sum(), repr(weight), copy.deepcopy(weight)]
        with torch.no_grad():
            weight.clamp_(-0.02, 0.02)
            head.data[3].zero_()
            one.model.layers[2].mlp.up_proj.weight.add_(one.model.layers[2].mlp.up_proj.weight, alpha=-0.1)
        return [*seen, view.sum(), weight.abs().max(), head.sum()]

    for step in range(3):
        seen = []
        for one, its in ((model, optimizer), (other, placed)):
            one(input_ids=ids(step), labels=ids(step)).loss.backward()
            with torch.no_grad():  # an update by hand
                one.model.layers[0].mlp.up_proj.weight.sub_(one.model.layers[0].mlp.up_proj.weight.grad, alpha=0.1)
            its.step()
            its.zero_grad()
            seen.append(between(one, its))
        for plain, moved in zip(*seen, strict=True):
            assert torch.equal(plain, moved) if isinstance(plain, Tensor) else plain == moved
    kept = other.model.layers[1].mlp.up_proj.weight.detach()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(kept, model.model.layers[1].mlp.up_proj.weight)
    with pytest.raises(UsageError, match="exchanged"):
        other.lm_head.weight.data = torch.zeros(64, 32)
    with pytest.raises(UsageError, match="pickled"):
        torch.save(other.lm_head.weight, tmp_path / "weight.pt")
    placed.release()
    assert all(type(parameter) is nn.Parameter for parameter in other.parameters())
