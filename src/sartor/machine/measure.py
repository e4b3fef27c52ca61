"""What a device computes in a second, measured: matrix products, operators on memory, attention, loss, AdamW, overheads.

Outputs go to memory that was there before; the cost of memory that is new is a rate of its own (`first_touch`). Operands of
products and of attention on a CPU come from memory by turns (`Operands`), as they do in a step; those of operators on memory are
the same in every repeat, at several sizes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sartor.machine.calibration import AttentionRate, DeviceRates, LossRate, MatmulRate, MemoryRate
from sartor.machine.clock import Call, Clock
from sartor.machine.measure_blocks import AsRun, block_operators, compiled_block_operators
from sartor.machine.operands import Operands, noise

FLOATS = (torch.float32, torch.bfloat16)
_ROWS_M = (16, 64, 256, 1024, 4096)
_SHAPES_NK = ((64, 64), (256, 256), (768, 768), (2048, 2048), (3072, 768), (768, 3072), (16, 768), (768, 16), (32_000, 768))
_GRADIENT_SHAPES_NK = ((64, 64), (256, 256), (768, 768), (3072, 768))
_DEVICE_ROWS_M, _DEVICE_SHAPES_NK = (16_384,), ((4096, 4096), (8192, 8192), (14_336, 4096))
"""Beside the others on accelerators, which reach their rates only there."""
_BATCHED_MNK = ((64, 64, 64), (128, 128, 64), (512, 512, 64))
_ORDINARY = 256 * 768 * 768
_SLOWEST_CALL_SECONDS = 0.3
"""What would take longer, by the rate of the one before, is left out."""
_LENGTHS = (64, 256, 1024)
_DEVICE_LENGTHS = (4096,)
_EXAMPLE_LENGTHS = (32, 128, 512)
_HEADS, _HEAD_SIZE = 12, 64
_COLUMNS = 1024
_MEMORY_BYTES = (2**16, 2**20, 2**23)
_COMPILED_ROWS_M, _COMPILED_SHAPES_NK = (64, 256, 1024), ((768, 768), (2048, 768), (768, 3072), (16, 768), (768, 16))
_MATMUL_SECONDS, _COMPILED_SECONDS, _MEMORY_SECONDS, _ATTENTION_SECONDS, _EXAMPLES_SECONDS = 4.0, 2.0, 5.0, 4.5, 1.0
"""Each at most: the products of one format, Sartor's own, the operators on memory, attention, that of short examples."""


def device_rates(clock: Clock, *, largest_bytes: int, notes: list[str], as_run: AsRun | None = None) -> DeviceRates:
    """All of them. `largest_bytes` is a size beyond the device's caches. What cannot be measured is noted and left out."""
    with torch.device(clock.device):
        operators = _operators(clock)
        recorded, backward = _recorded_operators(clock)
        view, view_backward = _recorded_operators(clock, lambda value: value.view(64))
        in_block, in_block_backward = block_operators(clock, (view, view_backward))
        compiled, compiled_backward = compiled_block_operators(clock, (view, view_backward), as_run)
        adamw, per_tensor = _adamw(clock)
        # Lists are made in this order, each within its own time.
        return DeviceRates(
            operator_seconds=operators,
            recorded_operator_seconds=recorded,
            view_seconds=view,
            view_backward_seconds=view_backward,
            block_operator_seconds=in_block,
            block_backward_operator_seconds=in_block_backward,
            compiled_block_operator_seconds=compiled,
            compiled_block_backward_operator_seconds=compiled_backward,
            backward_operator_seconds=backward,
            adamw_parameters_per_second=adamw,
            adamw_tensor_seconds=per_tensor,
            first_touch_bytes_per_second=_first_touch(clock),
            memory=tuple(_memory(clock, largest_bytes, notes)),
            attention=(*_attention_of_examples(clock, notes, as_run), *_attention(clock, notes)),
            loss=tuple(_loss(clock, notes)),
            matmul=(*_compiled_products(clock, as_run), *_matmul(clock, notes)),
        )


@contextlib.contextmanager
def _may_fail(what: str, notes: list[str]) -> Iterator[None]:
    """Not every device has every kernel for every format: that is a note, not the end."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        _note(f"{what} not measured: {str(error).strip().partition(chr(10))[0]}", notes)


def _note(note: str, notes: list[str]) -> None:
    if note not in notes:
        notes.append(note)


# -- matrix products -----------------------------------------------------------------------------------------------------------


def _matmul(clock: Clock, notes: list[str]) -> Iterator[MatmulRate]:
    clock.section(_MATMUL_SECONDS)
    for dtype in FLOATS:
        for m, n, k in _BATCHED_MNK:
            batch = max(1, 2**18 // (m * n)) * _HEADS
            with _may_fail(f"batched products of {_name(dtype)}", notes):
                yield from _batched(clock, batch, m, n, k, dtype)
    for dtype in (*FLOATS, torch.int8):
        rate, operands = float("inf"), Operands(dtype)
        clock.section(_MATMUL_SECONDS)
        for form, m, n, k in _problems(clock.device):
            flops = 2 * m * n * k
            if dtype == torch.int8 and (form != "nt" or m < 64 or min(n, k) < 64):
                continue
            if clock.late:
                _note(f"large products of {_name(dtype)} not measured: out of time", notes)
                break
            if flops / rate > _SLOWEST_CALL_SECONDS:
                continue
            with _may_fail(f"products of {_name(dtype)}", notes):
                rate = flops / clock.seconds(_product(form, m, n, k, dtype, operands))
                yield MatmulRate(dtype=_name(dtype), form=form, batch=1, m=m, n=n, k=k, flops_per_second=rate)


def _compiled_products(clock: Clock, as_run: AsRun | None) -> Iterator[MatmulRate]:
    """Sartor's own, in the formats in which there are any."""
    if as_run is None or clock.device.type != "cpu":
        return
    for dtype in FLOATS:
        clock.section(_COMPILED_SECONDS)
        operands = Operands(dtype)
        for (n, k), form, m in itertools.product(_COMPILED_SHAPES_NK, ("nt", "nn", "tn"), _COMPILED_ROWS_M):
            call = _product(form, m, n, k, dtype, operands, compiled=True)
            try:
                call()
            except RuntimeError as error:
                if "has to be compiled" in str(error):  # not on this processor
                    break
                raise
            rate = 2 * m * n * k / clock.seconds(call)
            yield MatmulRate(dtype=_name(dtype), form=f"compiled {form}", batch=1, m=m, n=n, k=k, flops_per_second=rate)


def _problems(device: torch.device) -> Iterator[tuple[str, int, int, int]]:
    """Ordinary ones first: what there is no time for are the smallest and the largest."""
    rows = _ROWS_M if device.type == "cpu" else _ROWS_M + _DEVICE_ROWS_M
    shapes = _SHAPES_NK if device.type == "cpu" else _SHAPES_NK + _DEVICE_SHAPES_NK
    problems = [("nt", m, n, k) for m in rows for n, k in shapes]
    problems += [(form, m, n, k) for form in ("nn", "tn") for m in rows[1:] for n, k in _GRADIENT_SHAPES_NK]
    return iter(sorted(problems, key=lambda problem: abs(math.log(problem[1] * problem[2] * problem[3] / _ORDINARY))))


def _product(
    form: str, m: int, n: int, k: int, dtype: torch.dtype, operands: Operands | None = None, *, compiled: bool = False
) -> Call:
    """The product as a linear layer asks for it, into an output that is there already."""
    operands = operands or Operands(dtype)
    if dtype == torch.int8:
        whole = torch.empty(m, n, dtype=torch.int32)
        pairs = operands.by_turns([(m, k), (n, k)], [])
        return lambda: torch._int_mm((pair := next(pairs))[0], pair[1].t(), out=whole)
    turns = operands.by_turns([(k, m) if form == "tn" else (m, k), (n, k) if form == "nt" else (k, n)], [(m, n)])

    def multiply() -> Tensor | None:
        left, right, out = next(turns)
        left, right = left.t() if form == "tn" else left, right.t() if form == "nt" else right
        if not compiled:
            return torch.mm(left, right, out=out)
        return torch.ops.sartor.matmul_(left, right, out, None, None, None, None, 1.0)  # type: ignore[no-any-return]

    return multiply


def _batched(clock: Clock, batch: int, m: int, n: int, k: int, dtype: torch.dtype) -> Iterator[MatmulRate]:
    """Scores (`nt`: queries by keys) and what is made of values (`nn`)."""
    scores, queries, keys = noise(batch, m, n, dtype=dtype), noise(batch, m, k, dtype=dtype), noise(batch, n, k, dtype=dtype)
    mixed = torch.empty_like(queries)
    flops = 2 * batch * m * n * k
    forward = clock.seconds(lambda: torch.bmm(queries, keys.mT, out=scores))
    yield MatmulRate(dtype=_name(dtype), form="nt", batch=batch, m=m, n=n, k=k, flops_per_second=flops / forward)
    seconds = clock.seconds(lambda: torch.bmm(scores, keys, out=mixed))
    yield MatmulRate(dtype=_name(dtype), form="nn", batch=batch, m=m, n=k, k=n, flops_per_second=flops / seconds)


# -- operators on memory -------------------------------------------------------------------------------------------------------


def _memory(clock: Clock, largest_bytes: int, notes: list[str]) -> Iterator[MemoryRate]:
    clock.section(_MEMORY_SECONDS)
    for size in (*_MEMORY_BYTES, largest_bytes):
        for dtype in FLOATS:
            if clock.late:
                _note("some sizes of operators on memory not measured: out of time", notes)
                continue
            rows = max(1, size // (3 * dtype.itemsize * _COLUMNS))
            for kind, (call, total) in _memory_calls(rows, dtype).items():
                with _may_fail(f"{kind} of {_name(dtype)}", notes):
                    rate = total / clock.seconds(call, budget=0.015)
                    yield MemoryRate(kind=kind, dtype=_name(dtype), total_bytes=total, bytes_per_second=rate)


def _memory_calls(rows: int, dtype: torch.dtype) -> dict[str, tuple[Call, int]]:
    """Operators over rows of _COLUMNS elements, with the bytes that they read and write."""
    aten: Any = torch.ops.aten
    a, b, out = (noise(rows, _COLUMNS, dtype=dtype) for _ in range(3))
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    cast, sums = torch.empty(rows, _COLUMNS, dtype=other), torch.empty(rows, dtype=dtype)
    mean, scale = torch.empty(rows, 1), torch.empty(rows, 1)
    weight, bias = noise(_COLUMNS, dtype=dtype), noise(_COLUMNS, dtype=dtype)
    order, flags = torch.randperm(rows), a > 0
    size = a.nbytes
    if a.device.type == "cpu":
        # Kernels of accelerators give mean and deviation of a row in float32, those of CPUs in the format of the input.
        mean, scale = mean.to(dtype), scale.to(dtype)
    return {
        "add": (lambda: torch.add(a, b, out=out), 3 * size),
        "copy": (lambda: out.copy_(a), 2 * size),
        "cast": (lambda: cast.copy_(a), size + cast.nbytes),
        "exp": (lambda: torch.exp(a, out=out), 2 * size),
        "silu": (lambda: aten.silu.out(a, out=out), 2 * size),
        "tanh": (lambda: torch.tanh(a, out=out), 2 * size),
        "bernoulli": (lambda: out.bernoulli_(0.9), size),
        "masked_fill": (lambda: out.masked_fill_(flags, 0.0), 2 * size + flags.nbytes),
        "softmax": (lambda: aten._softmax.out(a, -1, False, out=out), 2 * size),
        "layer_norm": (
            lambda: aten.native_layer_norm.out(a, [_COLUMNS], weight, bias, 1e-5, out0=out, out1=mean, out2=scale),
            2 * size,
        ),
        "sum": (lambda: torch.sum(a, -1, out=sums), size + sums.nbytes),
        "gather": (lambda: torch.index_select(a, 0, order, out=out), 2 * size),
    }


def _first_touch(clock: Clock, size: int = 2**27) -> float | None:
    """Writing to memory that is new, less writing to it again."""
    if clock.device.type != "cpu":
        return None
    again = torch.empty(size, dtype=torch.uint8)
    second = clock.seconds(lambda: again.fill_(1))
    first = clock.seconds(lambda: torch.empty(size, dtype=torch.uint8).fill_(1), budget=0.3)
    return size / max(first - second, 1e-6)


# -- attention, loss, optimizer ------------------------------------------------------------------------------------------------


def _attention(clock: Clock, notes: list[str]) -> Iterator[AttentionRate]:
    clock.section(_ATTENTION_SECONDS)
    for length in _LENGTHS if clock.device.type == "cpu" else _LENGTHS + _DEVICE_LENGTHS:
        batch = max(1, (2048 if clock.device.type == "cpu" else 16_384) // length)
        mask = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, length, length)
        for dtype in FLOATS:
            for form, given in (("causal", None), ("masked", mask)):
                if clock.late:
                    _note("some lengths of attention not measured: out of time", notes)
                    continue
                with _may_fail(f"attention of {_name(dtype)}", notes):
                    forward, backward = _attend(clock, (batch, _HEADS, length, _HEAD_SIZE), dtype, given)
                    yield _attention_rate(dtype, form, batch, length, (forward, backward))


def _attention_of_examples(clock: Clock, notes: list[str], as_run: AsRun | None) -> Iterator[AttentionRate]:
    """Sartor's own kernel, where there is one."""
    if as_run is None or clock.device.type != "cpu":
        return
    clock.section(_EXAMPLES_SECONDS)
    operands = {dtype: Operands(dtype) for dtype in FLOATS}
    for length in _EXAMPLE_LENGTHS:
        count = max(1, 1024 // length)
        where = [number for n in range(count) for number in (n * length, length, 0, 0, 0)]
        for dtype in FLOATS:
            with _may_fail(f"attention of short examples in {_name(dtype)}", notes):
                shape = (count * length, _HEADS, _HEAD_SIZE)
                turns = operands[dtype].by_turns([shape] * 4, [shape] * 3)
                forward, backward = _attend_examples(clock, turns, where)
                yield _attention_rate(dtype, "examples", count, length, (forward, backward))


def _attend_examples(clock: Clock, turns: Iterator[tuple[Tensor, ...]], where: Sequence[int]) -> tuple[float, float]:
    attend, back = torch.ops.sartor.attend_, torch.ops.sartor.attend_backward_
    none = torch.empty(0, _HEADS, _HEAD_SIZE)

    def forward() -> None:
        query, key, value, _, result, *_ = next(turns)
        attend(query, key, value, result, where, 0.125, 0)

    return clock.seconds(forward), clock.seconds(lambda: back(*next(turns), none, none, where, 0.125, 0))


def _attention_rate(dtype: torch.dtype, form: str, batch: int, length: int, seconds: tuple[float, float]) -> AttentionRate:
    """`seconds`: forward and backward."""
    product = batch * _HEADS * length**2 * _HEAD_SIZE
    return AttentionRate(
        dtype=_name(dtype),
        form=form,
        batch=batch,
        heads=_HEADS,
        length=length,
        head_size=_HEAD_SIZE,
        forward_flops_per_second=4 * product / seconds[0],
        backward_flops_per_second=10 * product / seconds[1],
    )


def _attend(clock: Clock, shape: tuple[int, ...], dtype: torch.dtype, mask: Tensor | None) -> tuple[float, float]:
    """Seconds forward and backward; the layout is that of a model: heads beside each other in a row of hidden values."""
    batch, heads, length, size = shape
    q, k, v = (noise(batch, length, heads, size, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    out = forward()
    gradient = torch.ones_like(out)
    return clock.seconds(forward), clock.seconds(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True))


def _loss(clock: Clock, notes: list[str]) -> Iterator[LossRate]:
    for dtype in FLOATS:
        for rows, vocabulary in ((512, 2048), (128, 32_000)):
            logits = noise(rows, vocabulary, dtype=dtype).requires_grad_()
            targets = torch.arange(rows)
            with _may_fail(f"loss of {_name(dtype)}", notes):
                loss = F.cross_entropy(logits, targets)
                forward = clock.seconds(lambda logits=logits, targets=targets: F.cross_entropy(logits, targets))  # type: ignore[misc]
                backward = clock.seconds(lambda loss=loss, logits=logits: torch.autograd.grad(loss, logits, retain_graph=True))  # type: ignore[misc]
                yield LossRate(
                    dtype=_name(dtype),
                    rows=rows,
                    vocabulary=vocabulary,
                    forward_elements_per_second=logits.numel() / forward,
                    backward_elements_per_second=logits.numel() / backward,
                )


def _adamw(clock: Clock, large: int = 2**23, small: int = 200) -> tuple[float, float]:
    """Parameters a second of one large tensor, and seconds for each of many small ones."""

    def step_seconds(parameters: list[Tensor]) -> float:
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        return clock.seconds(optimizer.step, budget=0.1)

    whole = step_seconds([torch.zeros(large, requires_grad=True)])
    many = step_seconds([torch.zeros(64, requires_grad=True) for _ in range(small)])
    return large / whole, many / small


# -- overheads -----------------------------------------------------------------------------------------------------------------


def _operators(clock: Clock) -> float:
    """Seconds of a tiny operator from Python. On accelerators what the host needs to start it."""
    a, b = noise(64), noise(64)
    with torch.no_grad():
        return clock.seconds(lambda: torch.add(a, b), budget=0.1)


def _recorded_operators(
    clock: Clock, operator: Callable[[Tensor], Tensor] = lambda value: value * 1.0, length: int = 64
) -> tuple[float, float]:
    """Seconds of a tiny operator recorded for backward, and of its backward, in a chain of `length`."""
    first = noise(64).requires_grad_()

    def chain() -> Tensor:
        value = first
        for _ in range(length):
            value = operator(value)
        return value

    end = chain()
    gradient = torch.ones_like(end)
    backward = clock.seconds(lambda: torch.autograd.grad(end, first, gradient, retain_graph=True), budget=0.1)
    return clock.seconds(chain, budget=0.1) / length, backward / length


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
