"""The loss of a micro-batch: cross entropy summed over its trained tokens, in float32.

On a CPU head and cross entropy are computed together, for the trained positions only (`sartor.kernels.loss`), where the model's
head can be computed apart from it; so is the MLP of the last block, where its code is known. Elsewhere the model makes logits
of all columns in which some row has a target.

Shapes: R rows, T positions, K positions that are kept for the head, N trained positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sartor.data.pack import IGNORE, Batch
from sartor.kernels.attention import attends_by_segments, segments_are
from sartor.kernels.loss import linear_cross_entropy
from sartor.kernels.prepack import prepacked
from sartor.kernels.segments import Segments, Wanted
from sartor.step.head import Head, Unreadable, find_head, hidden_states, last_block

FEWEST, MOST = 16, 0.9
"""How many positions of a micro-batch have to be trained, and which share may be, for others to be left out of the last block."""


@dataclass(frozen=True, kw_only=True)
class TensorBatch:
    """A `Batch` on a device."""

    input_ids_RT: Tensor
    targets_RT: Tensor
    position_ids_RT: Tensor | None
    kept_K: Tensor
    rows_N: np.ndarray
    """With `columns_N`: where the targets are. On the host, so that their number is known whatever the device does."""
    columns_N: np.ndarray
    segments: tuple[tuple[int, ...], ...] = ()
    """As in `Batch`: Python integers, so that no shape depends on a tensor's values."""
    continues: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, batch: Batch, device: str | torch.device) -> TensorBatch:
        positions = batch.position_ids_RT
        rows_N, columns_N = np.nonzero(batch.targets_RT != IGNORE)
        return cls(
            input_ids_RT=torch.as_tensor(batch.input_ids_RT, device=device),
            targets_RT=torch.as_tensor(batch.targets_RT, device=device),
            position_ids_RT=None if positions is None else torch.as_tensor(positions, device=device),
            kept_K=torch.as_tensor(batch.kept_K, device=device),
            segments=batch.segments,
            continues=batch.continues,
            rows_N=rows_N,
            columns_N=columns_N,
        )


class SumLoss:
    """Callable: (model, batch) → `factor` times the summed cross entropy, a float32 scalar.

    No attention mask is passed: rows are padded on the right, where a causal model's real tokens cannot see. Packed rows
    are told apart by position ids that start again with every example, from which transformers builds the mask.
    """

    def __init__(self, model: nn.Module, *, kind: str = "sartor", device_kind: str = "cpu") -> None:
        self._kind = kind
        self._by_segments = attends_by_segments(model)
        self._head: Head | None = None
        self.apart = ""
        """Why, on a CPU, the head is not computed together with the loss; nothing where it is."""
        if kind == "sartor" and device_kind == "cpu":
            try:
                self._head = find_head(model)
            except Unreadable as reason:
                self.apart = str(reason)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        accepted = inspect.signature(base.forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted
        self._takes_cache_flag = "use_cache" in accepted
        config = getattr(model, "active_peft_config", None)
        # Prompt tuning puts its virtual tokens before the row, so every position moves; a prefix lives in the cache.
        self._offset = 0
        if config is not None and config.is_prompt_learning and "PREFIX" not in str(config.peft_type):
            self._offset = int(config.num_virtual_tokens)
        plain = config is None or not config.is_prompt_learning
        self._last = last_block(model) if plain and self._by_segments and self._head is not None else None

    def __call__(self, model: nn.Module, batch: TensorBatch, *, factor: float = 1.0) -> Tensor:
        if not (self._by_segments and batch.segments):
            return self._sum(model, batch, factor)
        ids_RT = batch.input_ids_RT
        segments = Segments(batch.segments, ids_RT.shape[1], continues=batch.continues, device=ids_RT.device)
        if self._last is not None and FEWEST <= len(batch.rows_N) <= MOST * ids_RT.numel():
            segments.wanted = Wanted(self._last, self._places(batch, ids_RT.shape[1]))
        with segments_are(segments):
            return self._sum(model, batch, factor, segments.wanted)

    def _places(self, batch: TensorBatch, width: int) -> Tensor:
        """Of the trained positions, among those of all rows."""
        return torch.as_tensor(batch.rows_N * width + batch.columns_N + self._offset, device=batch.input_ids_RT.device)

    def _sum(self, model: nn.Module, batch: TensorBatch, factor: float, wanted: Wanted | None = None) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": batch.input_ids_RT}
        if batch.position_ids_RT is not None:
            inputs["position_ids"] = batch.position_ids_RT
        if self._takes_cache_flag:
            inputs["use_cache"] = False
        if self._head is not None:
            hidden_RTH = hidden_states(model, self._head.module, inputs)
            hidden_NH = hidden_RTH.flatten(0, 1)
            if wanted is None or not wanted.taken:
                hidden_NH = hidden_NH[self._places(batch, hidden_RTH.shape[1])]
            return self._together(self._head, hidden_NH, batch, factor)
        if self._kind == "hf":
            loss = _transformers_loss(model, inputs, batch)
        else:
            loss = self._of_logits(model, inputs, batch)
        return loss if factor == 1 else loss * factor

    def _together(self, head: Head, hidden_NH: Tensor, batch: TensorBatch, factor: float) -> Tensor:
        """Head and loss of the trained positions."""
        targets_N = batch.targets_RT.flatten()[torch.as_tensor(batch.rows_N * batch.targets_RT.shape[1] + batch.columns_N)]
        weight, bias, laid = head.module.weight, head.module.bias, prepacked(head.module)
        return linear_cross_entropy(hidden_NH, weight, targets_N, bias_V=bias, finish=head.finish, factor=factor, laid=laid)

    def _of_logits(self, model: nn.Module, inputs: dict[str, Any], batch: TensorBatch) -> Tensor:
        """The loss of the columns that are kept, from the model's own logits."""
        kept_K = batch.kept_K + self._offset
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
