"""Random cases of placement: a model, a budget, a policy, batches. Each is refused with a reason, or runs within its budget.

What is measured is not what the engine says of itself: at every operator the memory of all weights, gradients and optimizer state
is added up. Losses, norms and final weights are those of the same loop without placement, bit for bit.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sartor
from sartor.errors import UsageError
from sartor.placement.gradients import AwayGradient

OPTIMIZERS: dict[str, tuple[int, Callable[[Any], torch.optim.Optimizer]]] = {
    "adamw": (2, lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True)),
    "amsgrad": (3, lambda parameters: torch.optim.Adam(parameters, lr=1e-2, amsgrad=True)),
    "momentum": (1, lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)),
    "sgd": (0, lambda parameters: torch.optim.SGD(parameters, lr=1e-2)),
}
"""How often the optimizer keeps as much as the weights, and what makes it."""
TRAINS = {"everything": "", "attention": "attn|attention", "norms": "norm|ln_"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """All that was drawn."""

    seed: int
    family: str
    layers: int
    width: int
    vocabulary: int
    tied: bool
    dtype: torch.dtype
    recompute: bool
    trains: str
    optimizer: str
    policy: str
    share: float
    """Of weights, gradients and state: the budget."""
    lower: str
    activations: str
    rows: int
    length: int
    accumulate: int
    clip: bool

    @classmethod
    def draw(cls, seed: int) -> Case:
        draw = random.Random(seed)
        return cls(
            seed=seed,
            family=draw.choice(["llama", "llama", "gpt2", "mixtral", "t5"]),
            layers=draw.randint(1, 5),
            width=draw.choice([16, 32]),
            vocabulary=draw.choice([64, 64, 600]),
            tied=draw.random() < 0.5,
            dtype=draw.choice([torch.float32, torch.float32, torch.bfloat16]),
            recompute=draw.random() < 0.3,
            trains=draw.choice(["everything", "everything", "attention", "norms"]),
            optimizer=draw.choice(list(OPTIMIZERS)),
            policy=draw.choice(["auto", "auto", "auto", "auto", "host", "disk", "device"]),
            share=draw.uniform(0.1, 1.1),
            lower=draw.choice(["host", "disk"]),
            activations=draw.choice(["device", "device", "host", "disk"]),
            rows=draw.randint(1, 3),
            length=draw.choice([1, 5, 12, 33]),
            accumulate=draw.randint(1, 3),
            clip=draw.random() < 0.7,
        )

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        model = _FAMILIES[self.family](self).to(self.dtype).train()
        if self.recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.search(TRAINS[self.trains], name) is not None)
        return model

    def batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        for number in range(self.accumulate):
            generator = torch.Generator().manual_seed(100 * step + number)
            ids = torch.randint(0, 64, (self.rows, self.length + (self.family != "t5")), generator=generator)
            yield {"input_ids": ids, "labels": ids}


def _llama(case: Case) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_sizes(case), num_key_value_heads=2))


def _mixtral(case: Case) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_sizes(case), num_key_value_heads=2, num_local_experts=4))


def _gpt2(case: Case) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=case.vocabulary, n_embd=case.width, n_layer=case.layers, n_head=4, n_positions=64, **quiet)
    )


def _t5(case: Case) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": case.width, "d_kv": case.width // 4, "d_ff": 2 * case.width, "num_layers": case.layers, "num_heads": 4}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=case.vocabulary, dropout_rate=0.0, decoder_start_token_id=0, tie_word_embeddings=case.tied, **sizes)
    )


_FAMILIES: dict[str, Callable[[Case], nn.Module]] = {"llama": _llama, "mixtral": _mixtral, "gpt2": _gpt2, "t5": _t5}


def _sizes(case: Case) -> dict[str, Any]:
    return {
        "vocab_size": case.vocabulary,
        "hidden_size": case.width,
        "intermediate_size": 2 * case.width,
        "num_hidden_layers": case.layers,
        "num_attention_heads": 4,
        "tie_word_embeddings": case.tied,
    }


class Resident(TorchDispatchMode):
    """The most bytes of weights, gradients and optimizer state that there were at any operator."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self._parameters, self._optimizer = list(model.parameters()), optimizer
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.peak_bytes = max(self.peak_bytes, self._bytes())
        return result

    def _bytes(self) -> int:
        storages = {}
        with torch._C.DisableTorchFunctionSubclass():
            for parameter in self._parameters:
                gradient = parameter.grad
                held = gradient.held if isinstance(gradient, AwayGradient) else gradient
                state = self._optimizer.state.get(parameter, {}).values()
                for tensor in (parameter, held, *state):
                    if isinstance(tensor, Tensor) and tensor.numel() > 1:
                        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return sum(storages.values())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a case."""

    refused: str
    """Why, or nothing."""
    budget_bytes: int | None
    measured_bytes: int


def run_case(case: Case, folder: Path, *, steps: int = 2) -> Outcome:
    """Raises AssertionError where the case neither is refused with a reason nor runs as it should."""
    plain = case.model()
    placed = copy.deepcopy(plain)
    copies, make = OPTIMIZERS[case.optimizer]
    optimizers = [make([p for p in model.parameters() if p.requires_grad]) for model in (plain, placed)]
    whole = sum(p.nbytes * (2 + copies if p.requires_grad else 1) for p in plain.parameters())
    budget = int(case.share * whole) if case.policy == "auto" else None
    options: Any = {"folder": folder, "lower": case.lower, "policy": case.policy, "activations": case.activations}
    refused = ""
    try:
        model, optimizer = sartor.prepare(placed, optimizers[1], budget=budget, **options)
    except UsageError as error:  # then the budget that it names is enough, and one byte less is not
        refused = str(error)
        assert budget is not None
        found = re.search(r"budget=(\d+)", error.remedy)
        assert found is not None, refused
        named = int(found[1])
        assert named > budget, refused
        try:
            sartor.prepare(placed, optimizers[1], budget=named - 1, **options)
            raise AssertionError(f"less than the budget named is enough: {refused}")
        except UsageError:
            budget = named
        model, optimizer = sartor.prepare(placed, optimizers[1], budget=budget, **options)
    wanted = train(case, plain, optimizers[0], steps)
    with Resident(model, optimizers[1]) as resident:
        got = train(case, model, optimizer, steps)
    assert all(map(torch.equal, wanted, got)), "losses and norms"
    assert budget is None or resident.peak_bytes <= budget, f"{resident.peak_bytes} of {budget} bytes"
    optimizer.release()
    for (name, parameter), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    return Outcome(refused=refused, budget_bytes=budget, measured_bytes=resident.peak_bytes)


def train(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    """A plain loop; its losses and norms."""
    told = []
    for step in range(steps):
        for batch in case.batches(step):
            loss = model(**batch, use_cache=False).loss / case.accumulate
            loss.backward()
            told.append(loss.detach())
        if case.clip:
            told.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
    return told
