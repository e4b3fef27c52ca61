"""Head and cross entropy in one go, forward and backward, over chunks of rows; the logits are never all there.

The gradients of hidden states and head are formed while a chunk's logits are at hand, as in Liger Kernel (Hsu et al. 2024, arXiv
2410.10989). On a CPU the gain is memory that is written once instead of six times, and pages that need not be asked for.

Shapes: N rows with a target, C rows of a chunk, H hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sartor.kernels.native import library, operator

CHUNK_BYTES = 32 * 2**20
"""Logits of a chunk. Fewer rows make the products slower (the head's weight is read once a chunk, its gradient written), more
fall out of the cache. A head that trains gets twice as many."""
FEWEST_ROWS = 256
MOST_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What a model does to its logits: times `scale`, then, where `cap` is above 0, cap * tanh(logits / cap)."""

    scale: float = 1.0
    cap: float = 0.0

    def describe(self) -> str:
        parts = [f"times {self.scale:g}" if self.scale != 1 else "", f"capped at {self.cap:g}" if self.cap else ""]
        return ", ".join(part for part in parts if part)


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    finish: Finish | None = None,
    factor: float = 1.0,
) -> Tensor:
    """`factor` times the cross entropy of the rows, summed; a float32 scalar.

    `factor` is what the gradients are multiplied by while they are made, which is more exact in bfloat16 than afterwards. Under
    autocast the products are computed in its format. Every target is one of the V.
    """
    device = hidden_NH.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    grows = torch.is_grad_enabled()
    wanted = tuple(grows and tensor is not None and tensor.requires_grad for tensor in (hidden_NH, weight_VH, bias_V))
    result: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, bias_V, targets_N, finish or Finish(), factor, autocast, wanted
    )
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are formed in forward and handed out in backward, which can be asked for them once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        finish: Finish,
        factor: float,
        autocast: torch.dtype | None,
        wanted: tuple[bool, bool, bool],
    ) -> Tensor:
        given = [None if tensor is None else tensor.dtype for tensor in (hidden_NH, weight_VH, bias_V)]
        if autocast is not None:
            hidden_NH, weight_VH = hidden_NH.to(autocast), weight_VH.to(autocast)
            bias_V = None if bias_V is None else bias_V.to(autocast)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            loss, gradients = _chunks(hidden_NH, weight_VH, bias_V, targets_N, finish, factor, wanted)
        ctx.gradients = [
            gradient if gradient is None or dtype is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, given, strict=True)
        ]
        return loss * factor

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_cross_entropy hands its gradients out once: there is no second backward pass through it")
        return (*(None if gradient is None else gradient.mul_(given[0]) for gradient in gradients), *[None] * 5)


def rows_of_chunk(rows: int, vocabulary: int, element_bytes: int, *, trained: bool) -> int:
    """How many of `rows` are taken at once: as many in every chunk, but for the last."""
    most = (2 if trained else 1) * min(max(CHUNK_BYTES // (vocabulary * element_bytes), FEWEST_ROWS), MOST_ROWS)
    chunks = max(-(-rows // most), 1)
    return max(-(-rows // chunks), 1)


def _chunks(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    finish: Finish,
    factor: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The summed loss and the gradients that are wanted, those of weight and bias in float32 where several chunks add to them."""
    count, vocabulary = len(hidden_NH), len(weight_VH)
    rows = rows_of_chunk(count, vocabulary, hidden_NH.element_size(), trained=wanted[1])
    losses_N = hidden_NH.new_empty(count, dtype=torch.float32)
    buffer_CV = hidden_NH.new_empty((min(rows, count), vocabulary))
    to_hidden = torch.empty_like(hidden_NH) if wanted[0] else None
    to_weight = _Sum(weight_VH, rows=count, single=count <= rows) if wanted[1] else None
    to_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wanted[2] and bias_V is not None else None
    for first in range(0, count, rows):
        chunk = slice(first, min(first + rows, count))
        hidden_CH, logits_CV = hidden_NH[chunk], buffer_CV[: min(rows, count - first)]
        if bias_V is None:
            torch.mm(hidden_CH, weight_VH.t(), out=logits_CV)
        else:
            torch.addmm(bias_V, hidden_CH, weight_VH.t(), out=logits_CV)
        losses_N[chunk] = cross_entropy_(logits_CV, targets_N[chunk], finish.scale, finish.cap, factor if any(wanted) else 0.0)
        if to_hidden is not None:
            torch.mm(logits_CV, weight_VH, out=to_hidden[chunk])
        if to_weight is not None:
            to_weight.add(logits_CV, hidden_CH)
        if to_bias is not None:
            to_bias += logits_CV.sum(0, dtype=torch.float32)
    return losses_N.sum(), (to_hidden, None if to_weight is None else to_weight.total_VH, to_bias)


class _Sum:
    """The gradient of the head's weight. bfloat16 products of several chunks are summed in float32."""

    def __init__(self, weight_VH: Tensor, *, rows: int, single: bool) -> None:
        self._part_VH: Tensor | None = None
        self._fresh = True
        if single or weight_VH.dtype == torch.float32:
            self.total_VH = torch.empty_like(weight_VH) if rows else torch.zeros_like(weight_VH)
        else:
            self._part_VH = torch.empty_like(weight_VH)
            self.total_VH = torch.zeros_like(weight_VH, dtype=torch.float32)

    def add(self, gradient_CV: Tensor, hidden_CH: Tensor) -> None:
        if self._part_VH is not None:
            torch.mm(gradient_CV.t(), hidden_CH, out=self._part_VH)
            add_(self.total_VH, self._part_VH)
        elif self._fresh:
            torch.mm(gradient_CV.t(), hidden_CH, out=self.total_VH)
        else:
            self.total_VH.addmm_(gradient_CV.t(), hidden_CH)
        self._fresh = False


def _native_cross_entropy(logits_CV: Tensor, targets_C: Tensor, scale: float, cap: float, factor: float) -> Tensor:
    """Loss of every row, in float32; the logits become their gradient times `factor`, but where that is 0."""
    native = library() if logits_CV.is_cpu and logits_CV.is_contiguous() else None
    if native is None or logits_CV.dtype not in (torch.float32, torch.bfloat16):
        return _cross_entropy(logits_CV, targets_C, scale, cap, factor)
    losses_C = torch.empty(len(logits_CV), dtype=torch.float32)
    kernel = native.cross_entropy_bf16 if logits_CV.dtype == torch.bfloat16 else native.cross_entropy_f32
    targets_C = targets_C.contiguous()
    where, width = (logits_CV.data_ptr(), len(logits_CV)), logits_CV.shape[1]
    failed = kernel(*where, width, targets_C.data_ptr(), losses_C.data_ptr(), scale, cap, factor, torch.get_num_threads())
    if failed & 1:
        raise MemoryError("no memory for a row of logits")
    if failed:
        raise IndexError("a target lies outside of the vocabulary")
    return losses_C


def _cross_entropy(logits_CV: Tensor, targets_C: Tensor, scale: float, cap: float, factor: float) -> Tensor:
    """The same by PyTorch's operators."""
    bent_CV = torch.tanh(logits_CV.float() * (scale / cap)) if cap else None
    finished_CV = logits_CV.float() * scale if bent_CV is None else bent_CV * cap
    shares_CV = torch.log_softmax(finished_CV, dim=-1)
    losses_C = -shares_CV.gather(1, targets_C[:, None])[:, 0]
    if factor:
        shares_CV = shares_CV.exp_()
        shares_CV.scatter_add_(1, targets_C[:, None], torch.full_like(losses_C, -1.0)[:, None])
        if bent_CV is not None:
            shares_CV *= 1 - bent_CV.square()
        logits_CV.copy_(shares_CV.mul_(scale * factor))
    return losses_C


def _native_add(total: Tensor, part: Tensor) -> None:
    """total += part, a float32 and a bfloat16 tensor of one shape, without a copy of `part` in float32."""
    native = library() if total.is_cpu and part.dtype == torch.bfloat16 else None
    if native is None:
        for of_total, of_part in zip(total.split(FEWEST_ROWS), part.split(FEWEST_ROWS), strict=True):
            of_total += of_part
        return
    native.add_bf16(total.data_ptr(), part.data_ptr(), total.numel(), torch.get_num_threads())


cross_entropy_ = operator(
    "cross_entropy_(Tensor(a!) logits, Tensor targets, float scale, float cap, float factor) -> Tensor",
    _native_cross_entropy,
    lambda logits, targets, scale, cap, factor: logits.new_empty(len(logits), dtype=torch.float32),
)
add_ = operator("add_(Tensor(a!) total, Tensor part) -> ()", _native_add, lambda total, part: None)
