"""Causal attention of packed or padded rows, each example by itself: transformers' attention function `segments`, for CPUs.

PyTorch's kernel for CPUs takes a dense mask to tell the examples of a row apart, and computes and reads all of it. Here every
example is attended to by itself: short ones in compiled loops (`attend.py`), others as products of queries and keys, in blocks
of queries that stay in cache; backward computes the probabilities again, so nothing is kept but queries, keys and values. Which
positions are an example comes as Python integers with the batch (`sartor.kernels.segments`), so no shape depends on values. A
segment that continues another one (a beginning that examples share) attends to that as well, whose keys and values get the
gradients of all that continue it.

Shapes: R rows, T positions of a row, H query heads, G heads of keys and values, M = H / G, L positions of an example, B examples
times G, D size of a head (of values: E), Q queries and K keys of a block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from sartor.kernels.attend import attend_, attend_backward_, suits
from sartor.kernels.fused import causal_softmax_, softmax_backward_
from sartor.kernels.native import apply
from sartor.kernels.segments import Group, Segments

NAME = "segments"
"""Under which transformers knows this attention."""

BLOCK_ELEMENTS = 2**19
"""Scores of a block: 1 MiB in bfloat16, what a core's second cache holds."""

BLOCK_QUERIES = 128
"""Queries of a block of a long example: what lies above the diagonal is computed for the last block of keys only."""


class Unsuited(ValueError):
    """This attention cannot do what a model asks for."""


_CURRENT: ContextVar[Segments | None] = ContextVar("segments", default=None)


@contextlib.contextmanager
def segments_are(segments: Segments | None) -> Iterator[None]:
    """The context of a forward pass over a batch whose examples lie like this; None: masks are built as transformers does."""
    token = _CURRENT.set(segments)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def register() -> None:
    """Make `attn_implementation="segments"` known to transformers. Where no segments are said, it is `sdpa`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)


def mask_function(**options: Any) -> Any:
    """What transformers takes for the attention mask: the batch's segments, else the mask that `sdpa` takes."""
    from transformers.masking_utils import sdpa_mask

    segments = _CURRENT.get()
    plain = options["q_length"] == options["kv_length"] and options.get("attention_mask") is None
    bidirectional = "allow_is_bidirectional_skip" in options
    overlaid = options.get("use_vmap", False)  # a model's own additions to the causal mask
    chunked = getattr(options.get("config"), "attention_chunk_size", None) is not None
    if segments is None or not plain or bidirectional or overlaid or chunked:
        return sdpa_mask(**options)
    if segments.width != options["q_length"] or segments.rows != options["batch_size"]:
        return sdpa_mask(**options)
    local = options.get("local_size")
    return segments if local is None else segments.windowed(local)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' signature. query: R H T D; key, value: R G T D; the result: R T H E.

    Raises Unsuited for dropout and for attention that is not plain softmax (soft caps, sinks, biases).
    """
    if not isinstance(attention_mask, Segments):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        usual: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
        return usual
    if dropout:
        raise Unsuited(f"{type(module).__name__} drops attention probabilities out")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise Unsuited(f"the attention of {type(module).__name__} has a {name}")
    if options.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise Unsuited(f"{type(module).__name__} attends to both sides")
    attention_mask.uses.append(type(module).__name__)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return segment_attention(query, key, value, attention_mask, scale=scale), None


def attends_by_segments(model: nn.Module) -> bool:
    """Whether a model was built with this attention."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "_attn_implementation", None) == NAME


@torch.no_grad()
def unsuited(model: nn.Module) -> str:
    """Why this attention does not serve a model, or nothing. `model`: built with it, on the meta device, where it runs once."""
    ids = torch.zeros((1, 8), dtype=torch.long, device="meta")
    segments = Segments([[5, 3]], 8, device="meta")
    name, training = type(model).__name__, model.training
    model.train()
    try:
        with segments_are(segments), _no_questions():
            model(input_ids=ids)
    except Unsuited as error:
        return str(error)
    except Exception as error:  # whatever foreign code raises that takes the segments for a mask, or runs on real tensors only
        return f"{name} cannot run with it ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    finally:
        model.train(training)
    return "" if segments.uses else f"{name} masks or computes attention in a way of its own"


@contextlib.contextmanager
def _no_questions() -> Iterator[None]:
    """Keep transformers from asking for values while it prepares masks; tensors on the meta device have none."""
    from transformers import masking_utils

    original = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: True
    try:
        yield
    finally:
        masking_utils.is_tracing = original


def segment_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float) -> Tensor:
    """Causal softmax attention within each example. query: R H T D; key: R G T D; value: R G T E; the result: R T H E, zero where
    padding is. Probabilities are in the format of the queries, softmax inside is in float32."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    result: Tensor = apply(_SegmentAttention, query.to(dtype), key.to(dtype), value.to(dtype), segments, scale)
    return result


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.segments, ctx.scale = segments, scale
        sources = [_positions(tensor) for tensor in (query, key, value)]
        result = _Rows(query.shape[1], value.shape[-1], segments, query)
        with torch.autocast("cpu", enabled=False):
            compiled = suits(query)
            if compiled and segments.short:
                attend_(*sources, result.values(), segments.short, scale, segments.window)
            for group in segments.groups(compiled=compiled):
                q, k, v = _gathered(sources, group)
                result.put(group, _forward(q, k, v, scale, segments.window))
        return result.tensor()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        segments, tensors = ctx.segments, ctx.saved_tensors
        sources, gradients = [_positions(tensor) for tensor in tensors], gradient.flatten(0, 1)
        results = [_Rows(tensor.shape[1], tensor.shape[-1], segments, tensor) for tensor in tensors]
        compiled = suits(tensors[0])
        if compiled and segments.short:
            places = [result.values() for result in results]
            rows = sum(length for _, length in segments.more)
            more = [place.new_empty((rows, *place.shape[1:]), dtype=torch.float32) for place in places[1:]]
            attend_backward_(gradients, *sources, *places, *more, segments.short, ctx.scale, segments.window)
            for result, parts in zip(results[1:], more, strict=True):
                result.add(segments.more, parts)
        for group in segments.groups(compiled=compiled):
            q, k, v = _gathered(sources, group)
            g = _gather(gradients, group, group.index, group.length)
            if group.padding is not None:
                g.masked_fill_(group.padding[:, None, :, None], 0)
            for result, part in zip(results, _backward(q, k, v, g, ctx.scale, segments.window), strict=True):
                result.put(group, part)
        return *(result.tensor().transpose(1, 2) for result in results), None, None


def _positions(tensor_RHTD: Tensor) -> Tensor:
    """The positions of all rows one after the other: (R T) H D. No copy where the projection gave R T H D."""
    return tensor_RHTD.transpose(1, 2).flatten(0, 1)


def _gathered(sources: Sequence[Tensor], group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of a group, and the keys and values that they attend to."""
    query, key, value = sources
    several = group.before[1] + group.length
    return (
        _gather(query, group, group.index, group.length),
        _gather(key, group, group.keys, several),
        _gather(value, group, group.keys, several),
    )


def _gather(source: Tensor, group: Group, index: Tensor | None, length: int) -> Tensor:
    """Positions of the group's segments, N H L D, from (R T) H D. Padding repeats the last position."""
    if index is None:
        ((first, length),) = group.where
        return source.narrow(0, first, length).transpose(0, 1).contiguous()[None]
    found = source.index_select(0, index.clamp(max=source.shape[0] - 1))
    segments: Tensor = found.unflatten(0, (len(group.where), length))
    return segments.transpose(1, 2).contiguous()


class _Rows:
    """A result that groups fill in: R T H D. One position more takes what becomes of padding."""

    def __init__(self, heads: int, size: int, segments: Segments, like: Tensor) -> None:
        self._shape = (segments.rows, segments.width, heads, size)
        count = segments.rows * segments.width
        self._values = like.new_empty((count + 1, heads, size))
        for first, length in segments.padding:
            self._values.narrow(0, first, length).zero_()
        self._more: dict[int, Tensor] = {}

    def put(self, group: Group, part_NHLD: Tensor) -> None:
        """Of keys and values, what belongs to the segment that the group continues comes first: it is added up."""
        if ahead := part_NHLD.shape[2] - group.length:
            self.add([group.before], part_NHLD[:, :, :ahead].sum(0, dtype=torch.float32).transpose(0, 1))
            part_NHLD = part_NHLD[:, :, ahead:]
        by_position = part_NHLD.transpose(1, 2)
        if group.index is None:
            ((first, length),) = group.where
            self._values.narrow(0, first, length).copy_(by_position[0])
        else:
            self._values.index_copy_(0, group.index, by_position.flatten(0, 1))

    def add(self, where: Sequence[tuple[int, int]], parts: Tensor) -> None:
        """Rows of float32 that are added to these positions (first and number), one after the other."""
        if not where:
            return
        for (first, _), part in zip(where, parts.split([count for _, count in where]), strict=True):
            self._more[first] = self._more[first].add_(part) if first in self._more else part

    def values(self) -> Tensor:
        """All positions, and one more: P + 1, heads, size."""
        return self._values

    def tensor(self) -> Tensor:
        for first, more in self._more.items():
            place = self._values.narrow(0, first, len(more))
            place.copy_(more.add_(place))
        self._more.clear()
        return self._values[:-1].view(self._shape)


def _blocks(q_BMLD: Tensor, ahead: int, window: int) -> Iterator[tuple[slice, slice, slice]]:
    """(batch, queries, keys) of the blocks of a group. `ahead`: keys before those of the first query."""
    batch, sharing, length, _ = q_BMLD.shape
    for first in range(0, length, BLOCK_QUERIES):
        last = min(first + BLOCK_QUERIES, length)
        keys = slice(max(ahead + first - window + 1, 0) if window else 0, ahead + last)
        together = max(BLOCK_ELEMENTS // (sharing * (last - first) * (last - keys.start)), 1)
        for start in range(0, batch, together):
            yield slice(start, start + together), slice(first, last), keys


def _probabilities(q_BXD: Tensor, k_BKD: Tensor, queries: slice, keys: slice, ahead: int, window: int, scale: float) -> Tensor:
    """Softmax of the scores that are seen, B X K; X runs over heads that share keys, then queries."""
    scores = _product(q_BXD, k_BKD.transpose(1, 2), scale)
    causal_softmax_(scores, queries.stop - queries.start, ahead + queries.start - keys.start, window)
    return scores


def _product(one: Tensor, other: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(one.new_empty(()), one, other, beta=0, alpha=scale)


def _shared(tensor_NHLD: Tensor, groups: int) -> Tensor:
    """Heads by the keys they share: (N G) M L D."""
    shared: Tensor = tensor_NHLD.unflatten(1, (groups, -1))
    return shared.flatten(0, 1)


def _forward(q_NHLD: Tensor, k_NGLD: Tensor, v_NGLE: Tensor, scale: float, window: int) -> Tensor:
    (examples, groups), ahead = k_NGLD.shape[:2], k_NGLD.shape[2] - q_NHLD.shape[2]
    q, k, v = _shared(q_NHLD, groups), k_NGLD.flatten(0, 1), v_NGLE.flatten(0, 1)
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    for batch, queries, keys in _blocks(q, ahead, window):
        p = _probabilities(q[batch, :, queries].flatten(1, 2), k[batch, keys], queries, keys, ahead, window, scale)
        _put_product(out[batch, :, queries], p, v[batch, keys])
    return out.view(examples, -1, *out.shape[2:])


def _backward(q_NHLD: Tensor, k_NGLD: Tensor, v_NGLE: Tensor, g_NHLE: Tensor, scale: float, window: int) -> list[Tensor]:
    """The gradients of queries, keys and values."""
    groups, ahead = k_NGLD.shape[1], k_NGLD.shape[2] - q_NHLD.shape[2]
    q, g = _shared(q_NHLD, groups), _shared(g_NHLE, groups)
    k, v = k_NGLD.flatten(0, 1), v_NGLE.flatten(0, 1)
    # Several blocks of queries add to the same keys, in float32; or some keys are out of a window's reach.
    several = q.shape[2] > BLOCK_QUERIES or (ahead > 0 and window > 0)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(part, dtype=torch.float32) if several else torch.empty_like(part) for part in (k, v))
    for batch, queries, keys in _blocks(q, ahead, window):
        some_q, some_g = q[batch, :, queries].flatten(1, 2), g[batch, :, queries].flatten(1, 2)
        p = _probabilities(some_q, k[batch, keys], queries, keys, ahead, window, scale)
        ds = torch.bmm(some_g, v[batch, keys].transpose(1, 2))
        softmax_backward_(ds, p)
        _put_product(dq[batch, :, queries], ds, k[batch, keys], scale)
        if several:
            dk[batch, keys] += _product(ds.transpose(1, 2), some_q, scale)
            dv[batch, keys] += torch.bmm(p.transpose(1, 2), some_g)
        else:
            _put_product(dk[batch], ds.transpose(1, 2), some_q, scale)
            _put_product(dv[batch], p.transpose(1, 2), some_g)
    parts = (dq.view(q_NHLD.shape), dk.view(k_NGLD.shape), dv.view(v_NGLE.shape))
    return [part.to(q.dtype) for part in parts]


def _put_product(place: Tensor, one: Tensor, other: Tensor, scale: float = 1.0) -> None:
    """Write a product to its place in a result, at once where that is contiguous."""
    if place.is_contiguous():
        flat = place.view(one.shape[0], one.shape[1], other.shape[2])
        torch.baddbmm(flat, one, other, beta=0, alpha=scale, out=flat)
    else:
        place.copy_(_product(one, other, scale).view(place.shape))
