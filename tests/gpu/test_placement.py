"""Placement below a CUDA device: the same numbers as without it, within its budget, and on after a shortage. Skipped where there
is none."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import sartor
from sartor.placement.pinned import PinnedTier
from sartor.train import read_metrics
from sartor.train.metrics import Observer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 20
MIB = 2**20


def make_llama(layers: int = 8, width: int = 256) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=1024, num_hidden_layers=layers, tie_word_embeddings=True, **sizes)
    config._attn_implementation = "eager"  # of which every operator is deterministic
    return LlamaForCausalLM(config)


def train(model: nn.Module, optimizer: Any, steps: int = STEPS) -> list[Tensor]:
    """Losses and norms of steps of two micro-batches with clipping."""
    seen = []
    for step in range(steps):
        for micro_batch in range(2):
            generator = torch.Generator().manual_seed(2 * step + micro_batch)
            ids = torch.randint(0, 1024, (2, 128), generator=generator).cuda()
            loss = model(input_ids=ids, labels=ids).loss / 2
            loss.backward()
            seen.append(loss.detach())
        seen.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
    return [value.cpu() for value in seen]


class OnHost(torch.optim.AdamW):
    """The same update on host cores, of all that is in a block or in the embeddings: copied there, updated, copied back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=1e-3, fused=True)
        norm = {id(parameter) for parameter in model.model.norm.parameters()}  # type: ignore[union-attr]
        self.here = [p for p in model.parameters() if id(p) not in norm]
        self.twins = [nn.Parameter(p.detach().cpu()) for p in self.here]
        self.host = torch.optim.AdamW(self.twins, lr=1e-3, fused=True)

    def step(self, closure: Any = None) -> None:
        for parameter, twin in zip(self.here, self.twins, strict=True):
            twin.grad, parameter.grad = parameter.grad.cpu(), None
        self.host.step()
        super().step()
        for parameter, twin in zip(self.here, self.twins, strict=True):
            parameter.data.copy_(twin.data)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("where", [{"policy": "host"}, {"policy": "disk"}, {"policy": "host", "activations": "host"}])
def test_steps_are_those_of_an_update_on_host_cores(tmp_path: Path, where: dict[str, Any]) -> None:
    model = make_llama()
    other = copy.deepcopy(model)
    wanted = train(model.cuda(), OnHost(model))
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, fused=True)
    other, placed = sartor.prepare(other, optimizer, device="cuda", folder=tmp_path, **where)
    assert all(map(torch.equal, wanted, train(other, placed)))
    saved = other.state_dict()
    assert all(torch.equal(value.cpu(), saved[name].cpu()) for name, value in model.state_dict().items())
    placed.release()
    assert all(parameter.is_cuda for parameter in other.parameters())


def test_a_budget_is_kept() -> None:
    model = make_llama(layers=24)
    whole = 16 * sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    budget = int(0.4 * whole)
    model, placed = sartor.prepare(model, optimizer, device="cuda", budget=budget)
    assert torch.cuda.max_memory_allocated() - before <= budget, "loading"
    train(model, placed, steps=3)
    assert placed.engine.gauge.peak_bytes <= budget
    activations = 64 * MIB
    assert torch.cuda.max_memory_allocated() - before <= budget + activations
    assert torch.cuda.max_memory_allocated() - before < 0.7 * whole
    placed.release()


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


@contextlib.contextmanager
def at_most(allowed: int) -> Iterator[None]:
    """The process may have so much of the device."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


class Listener(Observer):
    """Remembers what a run says."""

    def __init__(self) -> None:
        self.words = ""

    def said(self, text: str) -> None:
        self.words += text


def test_a_shortage_is_recovered_from(job_tree: dict[str, Any], tmp_path: Path) -> None:
    """The device has a little less than the plan was made for: more leaves it, and the steps go on with the same losses."""
    job_tree |= {"machine": {"device": "auto"}, "precision": "float32"}
    job_tree["strategy"] = {"placement": "host"}
    torch.cuda.reset_peak_memory_stats()
    sartor.train(job_tree)
    with at_most(int(0.97 * torch.cuda.max_memory_reserved())):
        listener = Listener()
        sartor.train({**job_tree, "output": str(tmp_path / "less")}, observers=[listener])
    assert "memory ran out" in listener.words
    assert losses(tmp_path / "less") == pytest.approx(losses(tmp_path / "run"), rel=1e-4)


def test_main_memory_is_locked_exactly_and_used_again() -> None:
    tier = PinnedTier(torch.device("cuda", 0))
    region = tier.allocate(5 * MIB + 4096)
    assert tier.view(region).is_pinned()
    assert tier.view(region).nbytes == 5 * MIB + 4096
    tier.view(region).fill_(7)
    assert int(tier.view(region).cuda(non_blocking=True).sum()) == 7 * region.size
    tier.free(region)
    assert tier.allocate(5 * MIB).offset == region.offset, "a little less has the same place"
    assert tier.cost == ""
    tier.close()
