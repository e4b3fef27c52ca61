"""Operators of Sartor's own that do several things at once, as the time forecast sees them: one operation for each.

Shapes: N rows with a target, C rows of a chunk, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sartor.kernels.loss import Extent
from sartor.predict.operations import Operation

COMPILED = {"rms_norm", "silu_mul", "rotate"}
"""Operators of `sartor.kernels.fused` that tell that blocks were compiled."""


def extent_of(args: Sequence[Any]) -> Extent:
    """That of a call of `linear_cross_entropy_`."""
    return Extent.of(args[0], args[1], *args[6:8])


def head_and_loss(args: Sequence[Any]) -> list[Operation]:
    """Its logits, their softmax with the gradient, and the products that make the gradients of hidden states and weight."""
    extent, to_hidden_NH = extent_of(args), args[5]
    rows, columns, width, chunk = extent.rows, extent.vocabulary, extent.width, min(extent.most_rows, extent.rows)
    if not rows:
        return []
    logits_NV, hidden_NH, weight_VH = (extent.compute.itemsize * size for size in (rows * columns, rows * width, columns * width))
    weights = weight_VH * rows // chunk
    common: dict[str, Any] = {"dtype": str(extent.compute).removeprefix("torch."), "made_bytes": 0}
    product: dict[str, Any] = {"name": "mm", "family": "matmul", "flops": 2 * rows * columns * width, **common}
    sizes = 1, chunk, columns, width
    made = [
        Operation(**product, read_bytes=hidden_NH + weights, written_bytes=logits_NV, sizes=sizes, form="nt"),
        Operation(
            **common, name="cross_entropy_", family="softmax", flops=0, read_bytes=logits_NV, written_bytes=logits_NV,
            sizes=(rows * columns,),
        ),
    ]  # fmt: skip
    if to_hidden_NH is not None:
        sizes = 1, chunk, width, columns
        made.append(Operation(**product, read_bytes=logits_NV + weights, written_bytes=hidden_NH, sizes=sizes, form="nn"))
    if extent.weight is not None:
        again = 2 * weights - weight_VH  # written by every chunk, read by all but the first
        sizes = 1, columns, width, chunk
        read = logits_NV + hidden_NH + again - weights
        made.append(Operation(**product, read_bytes=read, written_bytes=weights, sizes=sizes, form="tn"))
    return made
