"""Context parallelism: the tokens of a row shared among ranks, attention in a ring (Liu et al. 2023, arXiv 2310.01889).

As transformers' Trainer and accelerate have it: PyTorch's ring attention (`torch.distributed.tensor.experimental`, 2.13), the
tokens dealt so that every rank has an early and a late part of the row (its head-and-tail load balancer), keys and values
gathered from all ranks, weights shared by FSDP2 over the ranks of `shard` and `context` together. Ring attention knows the plain
causal mask only, so masks are dropped, and what needs another one is refused.

PyTorch runs its ring around CUDA's kernels only; here the same functions run around the CPU's, which stands for them in a trace.

Shapes: R rows, T positions, H heads, D width of a head.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sartor.data.pack import IGNORE, Batch
from sartor.errors import JobError
from sartor.job.schema import Job
from sartor.methods import traits
from sartor.parallel.layout import Layout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

WITHOUT = "strategy.context=1"
_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_SEQUENCE = 2
"""Dimension of the tokens in [R, H, T, D]."""


def places(length: int, rank: int, ranks: int) -> np.ndarray:
    """The positions of a row of `length` tokens that a rank has: with `2 * ranks` chunks, its own and its opposite."""
    chunks_CT = np.arange(length).reshape(2 * ranks, -1)
    return np.concatenate([chunks_CT[rank], chunks_CT[2 * ranks - 1 - rank]])


def share(batch: Batch, rank: int, ranks: int) -> Batch:
    """A rank's part of a micro-batch of padded rows, which are padded further until they divide; its targets are its own,
    `trained_tokens` those of all ranks."""
    assert batch.position_ids_RT is None, "packed rows are refused"
    missing = -batch.input_ids_RT.shape[1] % (2 * ranks)
    ids_RT = np.pad(batch.input_ids_RT, ((0, 0), (0, missing)))
    targets_RT = np.pad(batch.targets_RT, ((0, 0), (0, missing)), constant_values=IGNORE)
    own = places(ids_RT.shape[1], rank, ranks)
    return dataclasses.replace(
        batch,
        input_ids_RT=ids_RT[:, own],
        targets_RT=targets_RT[:, own],
        kept_K=np.flatnonzero((targets_RT[:, own] != IGNORE).any(axis=0)),
    )


def fullest_rank(batch: Batch, ranks: int) -> int:
    """The rank that computes most logits; of equals the first, which also has most to do in the ring."""
    return max(range(ranks), key=lambda rank: (len(share(batch, rank, ranks).kept_K), -rank))


def divide(model: nn.Module, mesh: DeviceMesh, layout: Layout) -> nn.Module:
    """`model`, to be run under `ring_attention` on a rank's share of the tokens: it is told their positions, and its attention
    gets no masks. Raises JobError for models whose attention is not plainly causal."""
    _check(model)
    rank = mesh["context"].get_local_rank()

    def tell(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids_RT = named["input_ids"]
        positions_T = torch.from_numpy(places(ids_RT.shape[1] * layout.context, rank, layout.context))
        named["position_ids"] = positions_T.to(ids_RT.device).expand(ids_RT.shape)
        named["attention_mask"] = torch.ones_like(ids_RT)  # else positions that jump are taken for packed rows
        return args, named

    def drop(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "attention_mask" in named:
            named["attention_mask"] = None
        return args, named

    model.register_forward_pre_hook(tell, with_kwargs=True)
    for module in model.modules():
        if "Attention" in type(module).__name__:
            module.register_forward_pre_hook(drop, with_kwargs=True, prepend=True)
    return model


def check_job(job: Job) -> None:
    """Raises JobError for what is not supported with shared tokens."""
    if traits(job).virtual_tokens:
        raise JobError(
            f"method {job.method} puts virtual tokens before every row, whose tokens cannot be shared then", remedy=WITHOUT
        )
    if job.training.loss != "sartor":
        raise JobError("context parallel ranks have Sartor's loss only", remedy=f"training.loss=sartor, or {WITHOUT}")


def _check(model: nn.Module) -> None:
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "sliding_window", None) and not kinds and getattr(config, "use_sliding_window", True):
        kinds = {"sliding_attention"}
    if kinds - {"full_attention"} or not getattr(model, "_supports_context_parallel", True):
        what = ", ".join(sorted(kinds - {"full_attention"})) or "layers that hand a state along the row"
        raise _unsuited(model, f"ring attention knows the plain causal mask only, and the model has {what}")
    attention = getattr(model.config, "_attn_implementation", None)
    if attention != "sdpa":
        raise _unsuited(model, f"ring attention is PyTorch's, of its `sdpa`, not {attention}", "strategy.attention=sdpa")


def _unsuited(model: nn.Module, why: str, remedy: str = WITHOUT) -> JobError:
    return JobError(f"the rows of {type(model).__name__} cannot be shared by context parallel ranks", why=why, remedy=remedy)


@contextlib.contextmanager
def ring_attention(mesh: DeviceMesh, layout: Layout) -> Iterator[None]:
    """Within this context the CPU's attention kernel is PyTorch's ring around it, and attention that does not come to the kernel
    raises JobError. In this process, for as long as the context lasts."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    group = mesh["context"].get_group()
    calls = 0
    plain = torch.nn.functional.scaled_dot_product_attention

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        nonlocal calls
        calls += 1
        if attn_mask is not None or not is_causal:
            raise JobError("context parallel ranks attend causally and without masks only", remedy=WITHOUT)
        return _Ring.apply(query, key, value, group, dropout_p, scale)  # type: ignore[no-untyped-call]

    def attend(*args: Any, **options: Any) -> Tensor:
        before = calls
        result = plain(*args, **options)
        if calls == before:
            raise JobError(
                "context parallelism needs a fused attention kernel, and this attention is computed by plain operators",
                why="PyTorch's ring attention runs around flash, memory-efficient and cuDNN attention",
                remedy=f"precision=bf16, or {WITHOUT}",
            )
        return result

    balance = ring._cp_options.enable_load_balance
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_dot_product_flash_attention_for_cpu", kernel, "AutogradCPU")
        torch.nn.functional.scaled_dot_product_attention = attend
        ring._cp_options.enable_load_balance = True
        try:
            yield
        finally:
            torch.nn.functional.scaled_dot_product_attention = plain
            ring._cp_options.enable_load_balance = balance


class _Ring(torch.autograd.Function):
    """What PyTorch's dispatcher for DTensors makes of a kernel: its ring forward, its ring backward, the same tensors kept."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: Any, dropout_p: float, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        from torch.distributed.tensor.experimental._context_parallel._attention import _templated_ring_attention

        with torch._C._AutoDispatchBelowAutograd():
            out, logsumexp = _templated_ring_attention(
                group, _SEQUENCE, _KERNEL.default, query, key, value, is_causal=True, dropout_p=dropout_p, scale=scale
            )
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.group, ctx.options = group, {"dropout_p": dropout_p, "scale": scale}
        ctx.mark_non_differentiable(logsumexp)
        return out, logsumexp

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Any) -> Any:
        from torch.distributed.tensor.experimental._context_parallel._attention import _templated_ring_attention_backward

        query, key, value, out, logsumexp = ctx.saved_tensors
        with torch._C._AutoDispatchBelowAutograd():
            gradients = _templated_ring_attention_backward(
                ctx.group,
                _SEQUENCE,
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
                grad_out,
                "grad_out",
                query,
                key,
                value,
                out,
                logsumexp,
                True,
                **ctx.options,
            )
        return (*gradients[:3], None, None, None)
