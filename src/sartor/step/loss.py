"""The loss of a micro-batch: cross entropy summed over its trained tokens, in float32.

Shapes: R rows, T positions, K positions that are kept for the head, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sartor.data.pack import IGNORE, Batch
from sartor.kernels.attention import Segments, attends_by_segments, segments_are


@dataclass(frozen=True, kw_only=True)
class TensorBatch:
    """A `Batch` on a device."""

    input_ids_RT: Tensor
    targets_RT: Tensor
    position_ids_RT: Tensor | None
    kept_K: Tensor
    segments: tuple[tuple[int, ...], ...] = ()
    """As in `Batch`: Python integers, so that no shape depends on a tensor's values."""

    @classmethod
    def of(cls, batch: Batch, device: str | torch.device) -> TensorBatch:
        positions = batch.position_ids_RT
        return cls(
            input_ids_RT=torch.as_tensor(batch.input_ids_RT, device=device),
            targets_RT=torch.as_tensor(batch.targets_RT, device=device),
            position_ids_RT=None if positions is None else torch.as_tensor(positions, device=device),
            kept_K=torch.as_tensor(batch.kept_K, device=device),
            segments=batch.segments,
        )


class SumLoss:
    """Callable: (model, batch) → summed cross entropy, a float32 scalar.

    No attention mask is passed: rows are padded on the right, where a causal model's real tokens cannot see. Packed rows
    are told apart by position ids that start again with every example, from which transformers builds the mask.
    """

    def __init__(self, model: nn.Module, *, kind: str = "sartor") -> None:
        self._kind = kind
        self._by_segments = attends_by_segments(model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        accepted = inspect.signature(base.forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted
        self._takes_cache_flag = "use_cache" in accepted
        config = getattr(model, "active_peft_config", None)
        # Prompt tuning puts its virtual tokens before the row, so every position moves; a prefix lives in the cache.
        self._offset = 0
        if config is not None and config.is_prompt_learning and "PREFIX" not in str(config.peft_type):
            self._offset = int(config.num_virtual_tokens)

    def __call__(self, model: nn.Module, batch: TensorBatch) -> Tensor:
        if not (self._by_segments and batch.segments):
            return self._sum(model, batch)
        with segments_are(Segments(batch.segments, batch.input_ids_RT.shape[1], device=batch.input_ids_RT.device)):
            return self._sum(model, batch)

    def _sum(self, model: nn.Module, batch: TensorBatch) -> Tensor:
        kept_K = batch.kept_K + self._offset
        inputs: dict[str, Any] = {"input_ids": batch.input_ids_RT}
        if batch.position_ids_RT is not None:
            inputs["position_ids"] = batch.position_ids_RT
        if self._takes_cache_flag:
            inputs["use_cache"] = False
        if self._kind == "hf":
            return _transformers_loss(model, inputs, batch)
        if self._keeps_logits:
            logits_RKV = model(**inputs, logits_to_keep=kept_K).logits
        else:
            logits_RKV = model(**inputs).logits[:, kept_K]
        logits_RKV = logits_RKV.float()
        return F.cross_entropy(
            logits_RKV.flatten(0, 1), batch.targets_RT[:, batch.kept_K].flatten(), ignore_index=IGNORE, reduction="sum"
        )


def _transformers_loss(model: nn.Module, inputs: dict[str, Any], batch: TensorBatch) -> Tensor:
    """The sum that transformers' own loss makes of all logits in float32. It shifts the labels by itself."""
    labels_RT = F.pad(batch.targets_RT, (1, 0), value=IGNORE)[:, :-1]
    loss: Tensor = model(**inputs, labels=labels_RT, num_items_in_batch=1).loss
    return loss
