"""ATen operators as the time forecast sees them: family, floating point operations, bytes read and written.

FLOPs are those of `torch.utils.flop_counter` where it has a formula (multiply and add count as two). Bytes are those of operands
and results; of an operand that is broadcast, what there is in memory; of a table that is looked up, the rows that are fetched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from sartor.predict.operations import Group, Operation

FAMILIES = (
    "matmul",
    "attention",
    "elementwise",
    "transcendental",
    "softmax",
    "reduction",
    "norm",
    "copy",
    "fill",
    "index",
    "random",
    "optimizer",
    "collective",
    "other",
)

_SILENT = {
    "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense", "is_nonzero",
    "_record_function_enter_new", "_record_function_exit", "wait_tensor", "set_", "resize_", "barrier", "_reshape_alias",
    "alias", "detach", "lift_fresh", "is_same_size", "sym_size", "sym_numel", "sym_stride", "_assert_async", "lift", "item",
    "_has_compatible_shallow_copy_type", "recv_", "irecv",
}  # fmt: skip
"""Work of no consequence: views that PyTorch does not call views, memory without content, questions."""

_NAMES = {
    "transcendental": """exp expm1 log log1p sin cos tan tanh tanh_backward sigmoid sigmoid_backward silu silu_backward gelu
        gelu_backward pow erf softplus softplus_backward mish mish_backward hardswish elu""",
    "softmax": "_softmax _safe_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data logsumexp logaddexp",
    "reduction": """sum mean max min amax amin any all argmax prod var std var_mean linalg_vector_norm norm cumsum topk sort
        nll_loss_forward count_nonzero _foreach_norm gradient_norm""",
    "norm": """native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward _fused_rms_norm
        _fused_rms_norm_backward native_batch_norm native_batch_norm_backward""",
    "copy": """clone copy _to_copy cat stack chunk_cat split_with_sizes_copy all_gather_copy_in contiguous roll flip repeat
        constant_pad_nd view_copy expand_copy as_strided_copy _foreach_copy""",
    "fill": """zeros zeros_like ones ones_like full full_like fill zero new_zeros new_ones new_full arange scalar_tensor eye
        linspace nll_loss_backward _foreach_zero""",
    "index": """embedding embedding_dense_backward index index_put _index_put_impl index_select index_add gather scatter
        scatter_add slice_backward select_backward masked_fill nonzero index_copy take_along_dim slice_scatter select_scatter
        bincount histc""",
    "random": "native_dropout native_dropout_backward bernoulli rand rand_like randn uniform normal randint",
    "optimizer": "_fused_adamw _fused_adam _fused_sgd _fused_adagrad adamw adamw_blockwise adamw_compact",
}
_FAMILY_OF = {name: family for family, names in _NAMES.items() for name in names.split()}

COLLECTIVES = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "all_to_all_single": "all_to_all",
    "alltoall_base_": "all_to_all",
    "send": "send",
}
"""ATen's or c10d's name → what it is. A message counts where it is sent."""

_LOOKS_UP = {"embedding", "index", "index_select", "gather", "slice_backward", "select_backward", "nll_loss_forward"}
"""Reads what it fetches, not all of its first operand."""
_OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "_foreach_copy_", "_foreach_zero_", "zeros_"}
"""In place, without reading what was there."""
_PRODUCTS = {
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "_int_mm",
    "_scaled_mm",
    "_grouped_mm",
    "_scaled_grouped_mm",
    "linear",
    "mv",
    "addmv",
}
_ADDED_TO = "addmm", "baddbmm", "addmv"
"""Products whose first operand is what they are added to."""
_ATTENTION = "attention"


@functools.cache
def is_silent(func: Any) -> bool:
    """Whether the operator is a view, or does nothing that takes time on the device."""
    return bool(func.is_view) or func._schema.name.rpartition("::")[2] in _SILENT


@functools.cache
def is_collective(func: Any) -> bool:
    """Whether it sends something to other ranks."""
    namespace, _, name = func._schema.name.partition("::")
    return name in COLLECTIVES and "c10d" in namespace


def describe(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Operation | None:
    """The operator on these operands; None where it does no work."""
    name = func._schema.name.rpartition("::")[2]
    if is_silent(func):
        return None
    given = tensors_of((args, kwargs))
    results = tensors_of(result)
    if not given and not results:
        return None
    if is_collective(func):
        return _collective(func, COLLECTIVES[name], args, given, results)
    flops = _flops(func, name, args, kwargs, result)
    family = _family(func, name, flops)
    changed = _changed(func, args, kwargs)
    known = {id(tensor) for tensor in given}
    made = sum(tensor.numel() * tensor.element_size() for tensor in results if id(tensor) not in known)
    written = made + sum(_touched(tensor) for tensor in changed)
    return Operation(
        name=name,
        family=family,
        dtype=_dtype(given or results),
        flops=flops,
        read_bytes=_read(name, given, changed, results),
        written_bytes=written,
        made_bytes=made,
        sizes=_sizes(name, family, args, given or results),
        form=_form(func, name, family, args, kwargs),
        dense=_is_dense(given + results),
    )


def describe_one(name: str, tensors: Sequence[Tensor], *, written: Sequence[Tensor]) -> Operation:
    """The share of one parameter in an operator over lists: what it reads and writes."""
    return Operation(
        name=name,
        family=_family_by_name(name) or "elementwise",
        dtype=_dtype(tensors),
        flops=0,
        read_bytes=sum(_touched(tensor) for tensor in tensors),
        written_bytes=sum(_touched(tensor) for tensor in written),
        made_bytes=0,
        sizes=(max(tensor.numel() for tensor in tensors),),
    )


def tensors_of(values: Any) -> list[Tensor]:
    """Tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in tensors_of(value)]


def _family(func: Any, name: str, flops: int) -> str:
    if family := _family_by_name(name):
        return family
    if _ATTENTION in name:
        return _ATTENTION
    if flops:
        return "matmul"
    if torch.Tag.reduction in func.tags:
        return "reduction"
    if torch.Tag.pointwise in func.tags or name.startswith("_foreach_"):
        return "elementwise"
    return "other"


def _family_by_name(name: str) -> str:
    return _FAMILY_OF.get(name) or _FAMILY_OF.get(name.removesuffix("_"), "")


def _flops(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    if _ATTENTION in name and args and isinstance(args[0], Tensor):
        return _attention_flops(name, args)
    if name == "_grouped_mm":
        return _grouped_flops(args[0], args[1])
    if name == "_int_mm":
        return int(2 * math.prod(args[0].shape) * args[1].shape[-1])
    formula = flop_registry.get(torch.ops.aten.addmm if name == "addmm_" else func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _attention_flops(name: str, args: Sequence[Any]) -> int:
    """As torch's formula for SDPA, which knows no CPU kernels: two products in forward, five in backward. Operands are (batch,
    heads, length, width); keys and values of grouped heads count as often as they are used."""
    backward = name.endswith("_backward")
    query, key, value = args[1:4] if backward else args[:3]
    if query.dim() < 4:
        return 0
    batch, heads, length, width = query.shape
    scores = batch * heads * length * key.shape[-2]
    wide, narrow = (3, 2) if backward else (1, 1)
    return int(2 * scores * (wide * width + narrow * value.shape[-1]))


def _grouped_flops(first: Tensor, second: Tensor) -> int:
    """Products of groups of rows with one matrix each: every row meets one matrix. (2D x 2D: a product for each group.)"""
    return int(2 * math.prod(first.shape) * second.shape[-1])


def _sizes(name: str, family: str, args: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[int, ...]:
    if family == "matmul" and name.rstrip("_") in _PRODUCTS:
        first, second = (args[1], args[2]) if name.rstrip("_") in _ADDED_TO else (args[0], args[1])
        batch = int(math.prod(first.shape[:-2]))
        columns = int(second.shape[-1]) if second.dim() > 1 else 1
        return batch, int(first.shape[-2]), columns, int(first.shape[-1])
    if family == _ATTENTION and len(tensors) > 2:
        query, key = (tensors[1], tensors[2]) if name.endswith("_backward") else (tensors[0], tensors[1])
        if query.dim() == 4:
            batch, heads, length, width = query.shape
            return int(batch * heads), int(length), int(key.shape[-2]), int(width)
    return (max(tensor.numel() for tensor in tensors),)


def _form(func: Any, name: str, family: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    if family == "matmul" and name.rstrip("_") in _PRODUCTS:
        operands = args[1:3] if name.rstrip("_") in _ADDED_TO else args[:2]
        return "".join("t" if _is_transposed(operand) else "n" for operand in operands)
    if family != _ATTENTION:
        return ""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    if given.get("is_causal"):
        return "causal"
    return "masked" if any(given.get(mask) is not None for mask in ("attn_mask", "attn_bias", "bias")) else "full"


def _is_transposed(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and tensor.stride(-1) != 1 and tensor.stride(-2) == 1


def _changed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Operands that the operator writes to."""
    if not func._schema.is_mutable:
        return []
    changed: list[Tensor] = []
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed += tensors_of(args[at] if at < len(args) else kwargs.get(argument.name))
    return changed


def _read(name: str, given: Sequence[Tensor], changed: Sequence[Tensor], results: Sequence[Tensor]) -> int:
    if name in _LOOKS_UP:
        fetched = sum(_touched(tensor) for tensor in given[1:]) + sum(_touched(tensor) for tensor in results)
        return min(fetched, sum(_touched(tensor) for tensor in given))
    kept = {id(tensor) for tensor in changed} if name in _OVERWRITES else set()
    return sum(_touched(tensor) for tensor in given if id(tensor) not in kept)


def _touched(tensor: Tensor) -> int:
    """Bytes in memory behind a tensor: what is broadcast counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride:
            count *= size
    return int(count * tensor.element_size()) if tensor.numel() else 0


def _dtype(tensors: Sequence[Tensor]) -> str:
    """The first floating point format among the operands, else the first format."""
    chosen = next((tensor for tensor in tensors if tensor.is_floating_point()), tensors[0])
    return str(chosen.dtype).removeprefix("torch.")


def _is_dense(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors of the largest size lie in memory in the same order, without gaps."""
    most = max(tensor.numel() for tensor in tensors)
    strides = {tensor.stride() for tensor in tensors if tensor.numel() == most and most > 1}
    if len(strides) > 1:
        return False
    return all(_fills(tensor) for tensor in tensors if tensor.numel() == most)


def _fills(tensor: Tensor) -> bool:
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[::-1]):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _collective(func: Any, what: str, args: Sequence[Any], given: Sequence[Tensor], results: Sequence[Tensor]) -> Operation:
    """Bytes are those of the whole message: what is there before it is scattered, or after it was gathered."""
    tensors = [*given, *results]
    size = max(tensor.numel() * tensor.element_size() for tensor in tensors)
    group = _group(args, overlaps=func._schema.name.startswith("c10d::"))
    return Operation(
        name=what,
        family="collective",
        dtype=_dtype(tensors),
        flops=0,
        read_bytes=size,
        written_bytes=0,
        made_bytes=sum(tensor.numel() * tensor.element_size() for tensor in results),
        sizes=(size,),
        group=group,
    )


def _group(args: Sequence[Any], *, overlaps: bool) -> Group:
    """Of the process group among the arguments: an object, or its name."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    for value in args:
        if isinstance(value, str) and value not in ("sum", "avg", "max", "min", "product"):
            ranks = dist.get_process_group_ranks(distributed_c10d._resolve_process_group(value))  # type: ignore[attr-defined, arg-type]
        elif isinstance(value, torch.ScriptObject):
            try:
                ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(value))
            except Exception:  # another boxed object: the reduction's operator
                continue
        else:
            continue
        return Group(len(ranks), ranks[1] - ranks[0] if len(ranks) > 1 else 1, overlaps)
    return Group(1, 1)
