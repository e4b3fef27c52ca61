"""How long one operator takes: from rates measured on this machine, or from what is published of another.

A roofline for each operator (Williams, Waterman & Patterson 2009): its arithmetic at the rate of such arithmetic, its bytes at
the rate of the memory, whichever takes longer, and never less than an operator takes that does nothing.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Protocol

import numpy as np

from sartor.machine.calibration import Calibration, DeviceRates
from sartor.machine.catalogue import DeviceModel
from sartor.predict.operations import VIEW, Operation

Pass = str


class Rates(Protocol):
    """Seconds of an operator in a pass (`sartor.predict.operations.PASSES`)."""

    spread: float
    """How far a forecast with these rates may be off, as a share of it."""

    def seconds(self, operation: Operation, kind: Pass) -> float: ...

    def during(self, footprint: int, *, compiled: bool = False) -> Rates:
        """Those while a step runs that goes through so many bytes before it comes back to the same ones. `compiled`: its blocks
        have Sartor's kernels."""
        ...

    def peak(self, dtype: str) -> float:
        """Operations a second of the arithmetic in this format, at best."""
        ...


# -- measured here -------------------------------------------------------------------------------------------------------------

_KINDS = {
    "elementwise": "add",
    "transcendental": "silu",
    "softmax": "softmax",
    "reduction": "sum",
    "norm": "layer_norm",
    "copy": "copy",
    "fill": "copy",
    "index": "gather",
    "random": "bernoulli",
    "other": "add",
}
"""Family of operators → the calibration's operator on memory that is most like it."""
_OWN = {
    "pow": "add", "exp": "exp", "tanh": "tanh", "_to_copy": "cast", "masked_fill": "masked_fill", "masked_fill_": "masked_fill"
}  # fmt: skip
"""Operators unlike the rest of their family: the only power that models take is the square."""
_MEASURED_IN_CACHE = 23.0
"""Logarithm of the bytes up to which results are in memory that the allocator keeps, by default."""
ADAMW_BYTES = 28
"""Of a parameter that the measured AdamW updates: four float32 numbers are read and three written. Other optimizers' kernels are
taken to move theirs as fast."""
_NEAREST = 4
_CALIBRATED_SPREAD = 0.25

KEEPS_UP_TO = 32 * 2**20
"""Bytes of a tensor from which on glibc's malloc maps new memory each time (DEFAULT_MMAP_THRESHOLD_MAX, malloc.c), which the
system has to clear; what is smaller it keeps and hands out again."""


class CalibratedRates:
    """From a calibration of this machine. Rates between measured sizes are interpolated."""

    spread = _CALIBRATED_SPREAD

    def __init__(self, calibration: Calibration, *, keeps_up_to: int | None = KEEPS_UP_TO) -> None:
        """`keeps_up_to`: tensors from that size on are in memory that is new each time; None where the allocator keeps all.
        Raises ValueError for a calibration without products or operators on memory."""
        rates = calibration.device
        if not rates.matmul or not rates.memory:
            raise ValueError("the calibration is not complete: measure again when the machine is idle")
        self._rates, self._keeps_up_to, self._footprint = rates, keeps_up_to, 0
        self._overheads = {"backward": rates.block_backward_operator_seconds, "update": rates.operator_seconds}
        self._overhead = rates.block_operator_seconds
        self._products = _products(rates)
        self._memory = _memory(rates)
        self._attention = _attention(rates)
        self._loss = _loss(rates)
        self._known, self._product_rates = cache(self._seconds), cache(self._product_rate)
        self._during: dict[tuple[int, bool], CalibratedRates] = {}

    def during(self, footprint: int, *, compiled: bool = False) -> CalibratedRates:
        """Operators on memory are as fast as they are on operands of that size together: what is larger than the caches is not
        in them when it is used again."""
        if (footprint, compiled) not in self._during:
            made = self._during[footprint, compiled] = copy.copy(self)
            made._footprint, made._known = footprint, cache(made._seconds)
            ahead, back = self._rates.compiled_block_operator_seconds, self._rates.compiled_block_backward_operator_seconds
            if compiled and ahead is not None and back is not None:
                made._overhead, made._overheads = ahead, {**self._overheads, "backward": back}
        return self._during[footprint, compiled]

    def seconds(self, operation: Operation, kind: Pass) -> float:
        return self._known(operation, kind)

    def peak(self, dtype: str) -> float:
        known = [rate.flops_per_second for rate in self._rates.matmul if rate.dtype == dtype]
        return max(known or [rate.flops_per_second for rate in self._rates.matmul])

    def _seconds(self, operation: Operation, kind: Pass) -> float:
        rates = self._rates
        if operation.family == VIEW.family:
            return rates.view_backward_seconds if kind == "backward" else rates.view_seconds
        if operation.family == "optimizer":
            return operation.bytes / (ADAMW_BYTES * rates.adamw_parameters_per_second) + rates.adamw_tensor_seconds
        overhead = self._overheads.get(kind, self._overhead) if operation.called else 0.0
        return overhead + self._work(operation) + self._new_memory(operation)

    def _work(self, operation: Operation) -> float:
        if operation.family == "matmul" and operation.flops and len(operation.sizes) == 4:
            return operation.flops / self._product_rates(operation) + self._fetching(operation)
        if operation.family == "attention" and operation.flops:
            return operation.flops / self._attention_rate(operation)
        if operation.name in self._loss:
            return operation.sizes[0] / self._loss[operation.name](operation)
        return operation.bytes / self._memory_rate(operation)

    def _fetching(self, operation: Operation) -> float:
        """Products were measured with their operands as near as they fit; in a step they come from where the step left them."""
        near, far = (self._curve("copy", "float32")((math.log2(size),)) for size in self._sizes(operation))
        return max(operation.bytes / far - operation.bytes / near, 0.0)

    def _sizes(self, operation: Operation) -> tuple[int, int]:
        """Bytes of the operands, and of what the step goes through."""
        return max(operation.bytes, 1), max(operation.bytes, self._footprint, 1)

    def _new_memory(self, operation: Operation) -> float:
        touch = self._rates.first_touch_bytes_per_second
        if touch is None or self._keeps_up_to is None or operation.made_bytes < self._keeps_up_to:
            return 0.0
        return operation.made_bytes / touch

    def _product_rate(self, operation: Operation) -> float:
        batch, m, n, k = operation.sizes
        compiled = self._products.get(f"{operation.dtype} compiled") if operation.form.startswith(COMPILED) else None
        table = compiled or _of_format(self._products, operation.dtype)
        return table((_FORMS.get(operation.form, 0.0), math.log2(batch), math.log2(m), math.log2(n), math.log2(max(k, 1))))

    def _attention_rate(self, operation: Operation) -> float:
        form = operation.form if operation.form in ("masked", "examples") else "causal"
        direction = "backward" if operation.name.endswith("_backward") else "forward"
        if form == "examples" and (operation.dtype, form, direction) not in self._attention:
            form = "causal"
        table = self._attention.get((operation.dtype, form, direction)) or self._attention.get(("float32", form, direction))
        if table is None:  # none was measured: as two batched products
            return _of_format(self._products, operation.dtype)((0.0, 6.0, 8.0, 6.0, 8.0))
        rate = table((math.log2(max(operation.sizes[1], 1)),)) if len(operation.sizes) == 4 else table((8.0,))
        return rate if operation.form != "full" else rate / 2  # measured with a causal mask, which spares half

    def _memory_rate(self, operation: Operation) -> float:
        kind = _OWN.get(operation.name) or _KINDS.get(operation.family, "add")
        near, far = map(math.log2, self._sizes(operation))
        own = self._curve(kind, operation.dtype)
        if kind != "layer_norm":
            return own((far,))
        # It was measured with memory for its results, which large ones get anew from the system each time.
        return min(own((min(near, _MEASURED_IN_CACHE),)), self._curve("copy", operation.dtype)((far,)))

    def _curve(self, kind: str, dtype: str) -> Table:
        """Of this operator on memory, or of the most similar one that was measured."""
        alike = ((other, format) for other in (kind, "add", "copy") for format in (dtype, "float32"))
        return next((self._memory[key] for key in alike if key in self._memory), None) or next(iter(self._memory.values()))


COMPILED = "compiled "
"""Before the form of a product by Sartor's own loops."""
_FORMS = {"nt": 0.0, "nn": 1.0, "tn": 2.0, "tt": 2.0}
_FORMS |= {COMPILED + form: place for form, place in _FORMS.items()}

Table = Callable[[tuple[float, ...]], float]


def _table(points: Iterable[tuple[tuple[float, ...], float]]) -> Table:
    """Rates at any place: of the nearest measured ones, weighted by the inverse fourth power of the distance, as logarithms."""
    places, rates = zip(*points, strict=True)
    at, logs = np.array(places), np.log(np.array(rates))

    def look_up(place: tuple[float, ...]) -> float:
        distance = ((at - np.array(place)) ** 2).sum(axis=1)
        nearest = np.argsort(distance)[:_NEAREST]
        weights = 1 / (distance[nearest] + 1e-6) ** 2
        return float(np.exp((weights * logs[nearest]).sum() / weights.sum()))

    return look_up


def _line(points: Sequence[tuple[float, float]]) -> Table:
    """Rates between sizes given as logarithms, on straight lines; the outermost ones beyond."""
    sizes, rates = zip(*sorted(points), strict=True)
    logs = np.log(np.array(rates))
    return lambda place: float(np.exp(np.interp(place[0], sizes, logs)))


def _products(rates: DeviceRates) -> dict[str, Table]:
    points: dict[str, list[tuple[tuple[float, ...], float]]] = defaultdict(list)
    for rate in rates.matmul:
        place = (_FORMS.get(rate.form, 0.0), *(math.log2(size) for size in (rate.batch, rate.m, rate.n, rate.k)))
        points[f"{rate.dtype} compiled" if rate.form.startswith(COMPILED) else rate.dtype].append((place, rate.flops_per_second))
    return {dtype: _table(found) for dtype, found in points.items()}


def _of_format(tables: dict[str, Table], dtype: str) -> Table:
    for name in (dtype, "bfloat16" if dtype == "float16" else "float32", "float32"):
        if name in tables:
            return tables[name]
    return next(iter(tables.values()))


def _memory(rates: DeviceRates) -> dict[tuple[str, str], Table]:
    """The time of the smallest size is mostly that of the call itself, which is counted for every operator already."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for rate in rates.memory:
        seconds = rate.total_bytes / rate.bytes_per_second
        work = max(seconds - rates.operator_seconds, seconds / 10)
        points[rate.kind, rate.dtype].append((math.log2(rate.total_bytes), rate.total_bytes / work))
    return {key: _line(found) for key, found in points.items()}


def _attention(rates: DeviceRates) -> dict[tuple[str, str, str], Table]:
    points: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for rate in rates.attention:
        length = math.log2(rate.length)
        points[rate.dtype, rate.form, "forward"].append((length, rate.forward_flops_per_second))
        points[rate.dtype, rate.form, "backward"].append((length, rate.backward_flops_per_second))
    return {key: _line(found) for key, found in points.items()}


def _loss(rates: DeviceRates) -> dict[str, Callable[[Operation], float]]:
    """Elements a second of the loss's two large operators, by vocabulary and format."""
    if not rates.loss:
        return {}
    tables: dict[str, Callable[[Operation], float]] = {}
    for name, field in (
        ("_log_softmax", "forward_elements_per_second"),
        ("_log_softmax_backward_data", "backward_elements_per_second"),
    ):
        by_dtype: dict[str, list[float]] = defaultdict(list)
        for rate in rates.loss:
            by_dtype[rate.dtype].append(getattr(rate, field))
        # The slower of them had memory for its results that was new, which is counted by itself.
        best = {dtype: max(found) for dtype, found in by_dtype.items()}
        tables[name] = lambda operation, best=best: best.get(operation.dtype) or next(iter(best.values()))  # type: ignore[misc]
    return tables


# -- published -----------------------------------------------------------------------------------------------------------------

OTHER_MATMUL_SHARE = 0.80
"""Of the published peak, what large products reach on devices for which nobody published it; about the median of the others."""
ATTENTION_SHARES = {"A100": (0.73, 0.63), "H100": (0.35, 0.35), "H200": (0.35, 0.35)}
"""Of the peak, what FlashAttention-2 reaches forward and backward: Dao 2023 (arXiv 2307.08691, abstract and section 4), and for
Hopper Shah et al. 2024 (arXiv 2407.08608, abstract)."""
OTHER_ATTENTION_SHARES = (0.5, 0.4)
MEMORY_SHARE = 0.9
"""Of the published bandwidth, what reading and writing large tensors reaches; 0.91 was published of a Hopper card."""
LAUNCH_SECONDS = 5e-6
"""From one small kernel to the next when Python issues them; 4.2 microseconds were published of the same card's host."""
_PUBLISHED_SPREAD = 0.5


class CatalogueRates:
    """From published figures of a device, and shares of them that kernels of its generation are known to reach."""

    spread = _PUBLISHED_SPREAD

    def __init__(self, device: DeviceModel, *, speed: float = 1.0) -> None:
        """`speed`: of all kernels, compared with what is known of them, where a run on this device has been seen. Raises
        ValueError for a device whose rates are not published."""
        if not device.peak_flops_per_second or not device.memory_bandwidth_bytes_per_second:
            raise ValueError(f"{device.name} has no published rates")
        matmul = device.matmul_efficiency or OTHER_MATMUL_SHARE
        attention = next(
            (both for name, both in ATTENTION_SHARES.items() if device.name.startswith(name)), OTHER_ATTENTION_SHARES
        )
        self.device = device
        self._matmul, self._attention = speed * matmul, tuple(speed * share for share in attention)
        self._bandwidth = speed * MEMORY_SHARE * device.memory_bandwidth_bytes_per_second
        self._known = cache(self._seconds)

    def seconds(self, operation: Operation, kind: Pass) -> float:
        return self._known(operation, kind)

    def during(self, footprint: int, *, compiled: bool = False) -> CatalogueRates:
        """Published bandwidths are those of the memory, whatever the caches hold."""
        return self

    def peak(self, dtype: str) -> float:
        """Operations a second in this format, or in the nearest that the device has."""
        rates = self.device.peak_flops_per_second
        order = {"float32": ("float32", "tf32"), "float16": ("float16", "bfloat16"), "bfloat16": ("bfloat16", "float16")}
        return next((rates[name] for name in (*order.get(dtype, (dtype,)), "float32") if name in rates), max(rates.values()))

    def _seconds(self, operation: Operation, kind: Pass) -> float:
        if operation.family == VIEW.family:  # the host is ahead of the device
            return 0.0
        share, flops = self._matmul, operation.flops
        if operation.family == "attention":
            share = self._attention[operation.name.endswith("_backward")]
            flops = flops // 2 if operation.form == "causal" else flops
        arithmetic = flops / (share * self.peak(operation.dtype))
        return max(arithmetic, operation.bytes / self._bandwidth, LAUNCH_SECONDS)
