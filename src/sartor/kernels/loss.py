"""Head and cross entropy in one go, forward and backward, over chunks of rows; the logits are never all there.

The gradients of hidden states and head are formed while a chunk's logits are at hand, as in Liger Kernel (Hsu et al. 2024, arXiv
2410.10989). On a CPU the gain is memory that is written once instead of six times, and pages that need not be asked for.

Shapes: N rows with a target, C rows of a chunk, H hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sartor.kernels.matmul import product
from sartor.kernels.native import Operator, library
from sartor.kernels.prepack import Laid

CHUNK_BYTES = 96 * 2**20
"""Logits of a chunk. Fewer rows make the products slower: the head's weight is read, and laid out for them, once a chunk, and its
gradient written. A head that trains gets twice as many; gradients of several chunks take another matrix to be summed in."""
FEWEST_ROWS = 256
MOST_ROWS = 1024
WHOLE = 32
"""Numbers that a row of logits is a multiple of: lines of a cache, which products write and read whole."""
PRODUCT_ROWS = 8192
"""Of the head's gradient, computed at once."""


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
    laid: Laid = (None, None),
) -> Tensor:
    """`factor` times the cross entropy of the rows, summed; a float32 scalar. `laid`: the weight as `prepack` lays it out.

    `factor` is what the gradients are multiplied by while they are made, which is more exact in bfloat16 than afterwards. Under
    autocast the products are computed in its format. Every target is one of the V.
    """
    device = hidden_NH.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    grows = torch.is_grad_enabled()
    wanted = tuple(grows and tensor is not None and tensor.requires_grad for tensor in (hidden_NH, weight_VH, bias_V))
    result: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, bias_V, targets_N, finish or Finish(), factor, autocast, wanted, laid
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
        laid: Laid,
    ) -> Tensor:
        given = hidden_NH.dtype
        to_weight_VH = torch.empty_like(weight_VH) if wanted[1] else None
        to_bias_V = torch.empty_like(bias_V) if wanted[2] and bias_V is not None else None
        if autocast is not None:
            hidden_NH, weight_VH = hidden_NH.to(autocast), weight_VH.to(autocast)
            bias_V = None if bias_V is None else bias_V.to(autocast)
        to_hidden_NH = torch.empty_like(hidden_NH) if wanted[0] else None
        extent = Extent.of(hidden_NH, weight_VH, to_weight_VH, to_bias_V)
        workspace = hidden_NH.new_empty(extent.workspace_bytes, dtype=torch.uint8)
        results = (workspace, to_hidden_NH, to_weight_VH, to_bias_V)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            loss: Tensor = linear_cross_entropy_(
                hidden_NH, weight_VH, bias_V, targets_N, *results, finish.scale, finish.cap, factor, *laid
            )
        ctx.gradients = [None if to_hidden_NH is None else to_hidden_NH.to(given), to_weight_VH, to_bias_V]
        return loss

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_cross_entropy hands its gradients out once: there is no second backward pass through it")
        if not _is_one(given[0]):
            gradients = [None if gradient is None else gradient.mul_(given[0]) for gradient in gradients]
        return (*gradients, *[None] * 6)


def _is_one(gradient: Tensor) -> bool:
    """Whether a loss's own gradient is 1, as where a backward pass begins with it; without values it is taken to be."""
    return isinstance(gradient, FakeTensor) or gradient.is_meta or float(gradient) == 1.0


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How large a call is, from which follow its chunks and what it takes beside its results."""

    rows: int
    width: int
    vocabulary: int
    compute: torch.dtype
    weight: torch.dtype | None
    """Format of the gradient of the head's weight; None where it is frozen."""
    bias: bool
    """Whether it trains."""

    @classmethod
    def of(cls, hidden_NH: Tensor, weight_VH: Tensor, to_weight_VH: Tensor | None, to_bias_V: Tensor | None) -> Extent:
        return cls(
            rows=len(hidden_NH),
            width=weight_VH.shape[1],
            vocabulary=len(weight_VH),
            compute=weight_VH.dtype,
            weight=None if to_weight_VH is None else to_weight_VH.dtype,
            bias=to_bias_V is not None,
        )

    @property
    def most_rows(self) -> int:
        """Of a chunk."""
        most = min(max(CHUNK_BYTES // (self.vocabulary * self.compute.itemsize), FEWEST_ROWS), MOST_ROWS)
        return most if self.weight is None else 2 * most

    @property
    def chunk_rows(self) -> int:
        """As many in every chunk, but for the last."""
        return max(-(-self.rows // max(-(-self.rows // self.most_rows), 1)), 1)

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.chunk_rows)

    @property
    def sums(self) -> torch.dtype | None:
        """Format of the second matrix that the gradient of the weight needs: products of several chunks are summed in float32."""
        if self.weight is None:
            return None
        if self.weight != self.compute:
            return self.compute
        return torch.float32 if self.compute.itemsize < 4 and self.chunks > 1 else None

    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and formats of what lies in the workspace, one behind the other."""
        logits = min(self.chunk_rows, self.rows), -(-self.vocabulary // WHOLE) * WHOLE
        parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        parts |= {"losses": ((self.rows,), torch.float32), "logits": (logits, self.compute)}
        if self.sums is not None:
            parts["weight"] = (self.vocabulary, self.width), self.sums
        if self.bias:
            parts["bias"] = (self.vocabulary,), torch.float32
        return parts

    @property
    def workspace_bytes(self) -> int:
        return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in self.parts().values())

    def cut(self, workspace: Tensor) -> dict[str, Tensor]:
        """The workspace as its parts."""
        cut, first = {}, 0
        for name, (shape, dtype) in self.parts().items():
            size = math.prod(shape) * dtype.itemsize
            cut[name] = workspace[first : first + size].view(dtype).view(shape)
            first += _aligned(size)
        return cut


def _aligned(size_bytes: int) -> int:
    """To a line of the cache."""
    return -(-size_bytes // 64) * 64


def _chunks(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    workspace: Tensor,
    to_hidden_NH: Tensor | None,
    to_weight_VH: Tensor | None,
    to_bias_V: Tensor | None,
    scale: float,
    cap: float,
    factor: float,
    forward: Tensor | None = None,
    backward: Tensor | None = None,
) -> Tensor:
    """`factor` times the summed loss; writes the gradients that are wanted."""
    extent = Extent.of(hidden_NH, weight_VH, to_weight_VH, to_bias_V)
    parts, rows = extent.cut(workspace), extent.chunk_rows
    wanted = any(result is not None for result in (to_hidden_NH, to_weight_VH, to_bias_V))
    to_weight = None if to_weight_VH is None else _Sum(to_weight_VH, parts.get("weight"))
    if extent.bias:
        parts["bias"].zero_()
    for first in range(0, extent.rows, rows):
        chunk = slice(first, min(first + rows, extent.rows))
        hidden_CH, logits_CV = hidden_NH[chunk], parts["logits"][: min(rows, extent.rows - first), : extent.vocabulary]
        product(hidden_CH, weight_VH.t(), logits_CV, bias_V, laid=forward)
        parts["losses"][chunk] = _cross_entropy(logits_CV, targets_N[chunk], scale, cap, factor if wanted else 0.0)
        if to_hidden_NH is not None:
            product(logits_CV, weight_VH, to_hidden_NH[chunk], laid=backward)
        if to_weight is not None:
            to_weight.add(logits_CV, hidden_CH)
        if extent.bias:
            parts["bias"] += logits_CV.sum(0, dtype=torch.float32)
    if to_weight is not None:
        to_weight.finish()
    if to_bias_V is not None:
        to_bias_V.copy_(parts["bias"])
    return parts["losses"].sum() * factor


class _Sum:
    """The gradient of the head's weight, with the second matrix that it needs, if any (`Extent.sums`)."""

    def __init__(self, result_VH: Tensor, second_VH: Tensor | None) -> None:
        self._result_VH = result_VH
        self._part_VH = self._total_VH = result_VH
        if second_VH is not None and second_VH.dtype == torch.float32:
            self._total_VH = second_VH
        elif second_VH is not None:
            self._part_VH = second_VH
        self._fresh = True

    def add(self, gradient_CV: Tensor, hidden_CH: Tensor) -> None:
        if self._part_VH is not self._total_VH:
            _product(gradient_CV, hidden_CH, self._part_VH)
            if self._fresh:
                self._total_VH.copy_(self._part_VH)
            else:
                _add(self._total_VH, self._part_VH)
        elif self._fresh:
            _product(gradient_CV, hidden_CH, self._total_VH)
        else:
            _product(gradient_CV, hidden_CH, self._total_VH, adds=True)
        self._fresh = False

    def finish(self) -> None:
        if self._fresh:
            self._result_VH.zero_()
        elif self._total_VH is not self._result_VH:
            self._result_VH.copy_(self._total_VH)


def _product(gradient_CV: Tensor, hidden_CH: Tensor, result_VH: Tensor, *, adds: bool = False) -> None:
    """gradient^T hidden, or that is added to the result, some thousand rows of it at a time: in bfloat16 half as fast again as
    all at once."""
    for gradient_CP, result_PH in zip(gradient_CV.split(PRODUCT_ROWS, dim=1), result_VH.split(PRODUCT_ROWS), strict=True):
        product(gradient_CP.t(), hidden_CH, result_PH, adds=adds)


def _cross_entropy(logits_CV: Tensor, targets_C: Tensor, scale: float, cap: float, factor: float) -> Tensor:
    """Loss of every row, in float32; the logits become their gradient times `factor`, but where that is 0."""
    native = library() if logits_CV.is_cpu and logits_CV.stride(1) == 1 else None
    if native is None or logits_CV.dtype not in (torch.float32, torch.bfloat16):
        return _cross_entropy_by_operators(logits_CV, targets_C, scale, cap, factor)
    losses_C = torch.empty(len(logits_CV), dtype=torch.float32)
    kernel = native.cross_entropy_bf16 if logits_CV.dtype == torch.bfloat16 else native.cross_entropy_f32
    targets_C = targets_C.contiguous()
    where, width = (logits_CV.data_ptr(), *logits_CV.stride()[:1], len(logits_CV)), logits_CV.shape[1]
    failed = kernel(*where, width, targets_C.data_ptr(), losses_C.data_ptr(), scale, cap, factor, torch.get_num_threads())
    if failed & 1:
        raise MemoryError("no memory for a row of logits")
    if failed:
        raise IndexError("a target lies outside of the vocabulary")
    return losses_C


def _cross_entropy_by_operators(logits_CV: Tensor, targets_C: Tensor, scale: float, cap: float, factor: float) -> Tensor:
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


def _add(total: Tensor, part: Tensor) -> None:
    """total += part, a float32 and a bfloat16 tensor of one shape, without a copy of `part` in float32."""
    native = library() if total.is_cpu and part.dtype == torch.bfloat16 else None
    if native is None:
        for of_total, of_part in zip(total.split(FEWEST_ROWS), part.split(FEWEST_ROWS), strict=True):
            of_total += of_part
        return
    native.add_bf16(total.data_ptr(), part.data_ptr(), total.numel(), torch.get_num_threads())


linear_cross_entropy_ = Operator(
    "linear_cross_entropy_(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor(a!) workspace, "
    "Tensor(b!)? to_hidden, Tensor(c!)? to_weight, Tensor(d!)? to_bias, float scale, float cap, float factor, "
    "Tensor? forward=None, Tensor? backward=None) -> Tensor",
    _chunks,
    lambda hidden, *_: hidden.new_empty((), dtype=torch.float32),
)
"""One operator for all chunks, so that what a trace sees does not depend on their number."""
