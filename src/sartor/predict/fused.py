"""Operators of Sartor's own that do several things at once, as the time forecast sees them: one operation for each.

Shapes: N rows with a target, C rows of a chunk, H hidden width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from sartor.kernels.attend import NUMBERS, attend_, attend_backward_
from sartor.kernels.lora import add_low_rank_, low_rank_backward_
from sartor.kernels.loss import Extent, linear_cross_entropy_
from sartor.kernels.matmul import matmul_, multiplies
from sartor.kernels.thin import thin_
from sartor.predict.operations import Operation
from sartor.predict.rates import COMPILED as BY_OWN_LOOPS

COMPILED = {"rms_norm", "silu_mul", "rotate"}
"""Operators of `sartor.kernels.fused` that tell that blocks were compiled."""
HEAD, CROSS_ENTROPY = "head", "cross_entropy_"
"""Names of the parts of `linear_cross_entropy_`: products of the head, and what is done to logits. Both grow with the trained
positions alone."""


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
    product: dict[str, Any] = {"name": HEAD, "family": "matmul", "flops": 2 * rows * columns * width, **common}
    form = BY_OWN_LOOPS if multiplies(extent.compute) else ""
    sizes = 1, chunk, columns, width
    made = [
        Operation(**product, read_bytes=hidden_NH + weights, written_bytes=logits_NV, sizes=sizes, form=form + "nt"),
        Operation(
            **common, name=CROSS_ENTROPY, family="softmax", flops=0, read_bytes=logits_NV, written_bytes=logits_NV,
            sizes=(rows * columns,),
        ),
    ]  # fmt: skip
    if to_hidden_NH is not None:
        sizes = 1, chunk, width, columns
        made.append(Operation(**product, read_bytes=logits_NV + weights, written_bytes=hidden_NH, sizes=sizes, form=form + "nn"))
    if extent.weight is not None:
        again = 2 * weights - weight_VH  # written by every chunk, read by all but the first
        sizes = 1, columns, width, chunk
        read = logits_NV + hidden_NH + again - weights
        made.append(Operation(**product, read_bytes=read, written_bytes=weights, sizes=sizes, form=form + "tn"))
    return made


def attention_of_examples(args: Sequence[Any], *, backward: bool) -> list[Operation]:
    """A call of `attend_` or of its backward, as if all its work were on examples of one length: that of most of it."""
    query, key, value = args[1:4] if backward else args[:3]
    where = args[9 if backward else 4]
    heads, size, value_size, itemsize = query.shape[1], query.shape[2], value.shape[2], query.element_size()
    wide, narrow = (3, 2) if backward else (1, 1)
    lengths, ahead_of_it = where[1::NUMBERS], where[3::NUMBERS]
    # Of an example's own keys half are skipped, of a beginning's none: these count twice.
    scores = [length * (length + 2 * before) for length, before in zip(lengths, ahead_of_it, strict=True)]
    positions, squares = sum(lengths), sum(scores)
    length = sum(length * score for length, score in zip(lengths, scores, strict=True)) // squares
    ahead = positions * itemsize * (heads * size + key.shape[1] * (size + value_size))
    result = positions * itemsize * heads * value_size
    made = Operation(
        name="attend_backward" if backward else "attend",
        family="attention",
        dtype=str(query.dtype).removeprefix("torch."),
        flops=2 * heads * squares * (wide * size + narrow * value_size),
        read_bytes=ahead + (result if backward else 0),
        written_bytes=ahead if backward else result,
        made_bytes=0,
        sizes=(heads * len(lengths), length, length, size),
        form="examples",
    )
    return [made]


def low_rank(args: Sequence[Any], *, backward: bool) -> list[Operation]:
    """A call of `add_low_rank_` or of its backward: the products that it stands for."""
    x_MK, b_NR = (args[1], args[4]) if backward else (args[0], args[2])
    (rows, inside), (outside, rank) = x_MK.shape, b_NR.shape
    products = [(rows, rank, inside, "nt"), (rows, outside, rank, "nt")]
    if backward:
        products = [(rows, rank, outside, "nn"), (rank, inside, rows, "tn"), (outside, rank, rows, "tn")]
        products += [(rows, inside, rank, "nn")] if args[5] is not None else []
    return [_product(x_MK, m, n, k, form) for m, n, k, form in products]


def thin(args: Sequence[Any]) -> list[Operation]:
    """A call of `thin_`: its products."""
    z_MC, w_CR, _, given_MR, *_ = args
    rows, columns = z_MC.shape
    made = []
    if w_CR is not None:
        made.append(_product(z_MC, rows, w_CR.shape[1], columns, BY_OWN_LOOPS + ("nn" if w_CR.stride(1) == 1 else "nt")))
    if given_MR is not None:
        made.append(_product(z_MC, given_MR.shape[1], columns, rows, BY_OWN_LOOPS + "tn"))
    return made


def _product(like: torch.Tensor, m: int, n: int, k: int, form: str) -> Operation:
    size = like.element_size()
    return Operation(
        name="mm",
        family="matmul",
        dtype=str(like.dtype).removeprefix("torch."),
        flops=2 * m * n * k,
        read_bytes=size * (m * k + k * n),
        written_bytes=size * m * n,
        made_bytes=0,
        sizes=(1, m, n, k),
        form=form,
    )


def product(args: Sequence[Any]) -> list[Operation]:
    """A call of `matmul_`: its product, with what it adds of low rank."""
    (a, b, c, _, _, more_a), adds = args[:6], len(args) > 8 and args[8]
    (m, k), n, more_k = a.shape, b.shape[1], 0 if more_a is None else more_a.shape[1]
    size, turned = a.element_size(), ("t" if matrix.stride(1) != 1 else "n" for matrix in (a, b))
    made = Operation(
        name="mm",
        family="matmul",
        dtype=str(a.dtype).removeprefix("torch."),
        flops=2 * m * n * (k + more_k),
        read_bytes=size * ((m + n) * (k + more_k) + (c.numel() if adds else 0)),
        written_bytes=c.numel() * size,
        made_bytes=0,
        sizes=(1, m, n, k),
        form=BY_OWN_LOOPS + "".join(turned),
    )
    return [made]


def parts_of(func: Any, args: Sequence[Any]) -> list[Operation] | None:
    """What an operator of Sartor's own does, where that is several things. All but the first are not called for."""
    if func is linear_cross_entropy_.overload:
        parts = head_and_loss(args)
    elif func is attend_.overload or func is attend_backward_.overload:
        parts = attention_of_examples(args, backward=func is attend_backward_.overload)
    elif func is matmul_.overload:
        parts = product(args)
    elif func is thin_.overload:
        parts = thin(args)
    elif func is add_low_rank_.overload or func is low_rank_backward_.overload:
        parts = low_rank(args, backward=func is low_rank_backward_.overload)
    else:
        return None
    return parts[:1] + [dataclasses.replace(part, called=False) for part in parts[1:]]
