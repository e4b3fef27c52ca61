"""Experts whose code asks which tokens go where: traced as if every expert got the same share of them.

Most models of transformers multiply the tokens of all experts at once; those here go from expert to expert.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_MOST_GROUPS = 16
"""Of experts, where a trace would take minutes with each by itself: what is kept of all of them is the same."""


@contextlib.contextmanager
def even_experts() -> Iterator[None]:
    """Within it, these experts are traced without values."""
    changed: list[tuple[Any, Any]] = []
    for (module, name), forward in _FORWARDS.items():
        # Where its code has not been loaded, no model of the kind has been made.
        experts = getattr(sys.modules.get(f"transformers.models.{module}"), name, None)
        if experts is not None:
            changed.append((experts, experts.forward))
            experts.forward = forward
    try:
        yield
    finally:
        for experts, original in changed:
            experts.forward = original


def _places(top_k_index: Tensor, experts: int, groups: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Groups of experts, and as many positions as they get tokens: among a token's experts, and among tokens."""
    with torch.no_grad():
        mask = F.one_hot(top_k_index, num_classes=experts + 1).permute(2, 1, 0)
    share, size = -(-top_k_index.numel() // experts), -(-experts // groups)
    for first in range(0, experts, size):
        group = slice(first, min(first + size, experts))
        count = share * (group.stop - first)
        yield group, mask.new_zeros(count), mask.new_zeros(count)


def _dbrx(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As modeling_dbrx.py does it."""
    batch_size = hidden_states.shape[0]
    hidden_states = hidden_states.reshape(-1, self.hidden_size)
    next_states = torch.zeros_like(hidden_states)
    shape = (-1, self.ffn_hidden_size, self.hidden_size)
    for expert, index, token in _places(top_k_index, self.num_experts, self.num_experts):
        v1, w1, w2 = (weight.view(shape)[expert.start] for weight in (self.mlp.v1, self.mlp.w1, self.mlp.w2))
        states = self.mlp(hidden_states[token], w1, v1, w2)
        states = states.view(-1, self.hidden_size) * top_k_weights[token, index, None]
        next_states.index_add_(0, token, states)
    return next_states.view(batch_size, -1, self.hidden_size)


def _step(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As modeling_step3p7.py does it, but some of hundreds of experts together."""
    final = torch.zeros_like(hidden_states)
    for group, index, token in _places(top_k_index, self.num_experts, _MOST_GROUPS):
        count = group.stop - group.start
        given = hidden_states[token].view(count, -1, hidden_states.shape[-1])
        current = self._apply_gate(torch.bmm(given, self.gate_up_proj[group].mT))
        current = torch.bmm(current, self.down_proj[group].mT).flatten(0, 1) * top_k_weights[token, index, None]
        final.index_add_(0, token, current.to(final.dtype))
    return final


_FORWARDS: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("dbrx.modeling_dbrx", "DbrxExperts"): _dbrx,
    ("step3p7.modeling_step3p7", "Step3p7Experts"): _step,
}
