"""Estimates of memory and time that take milliseconds a strategy, from two short traces: they rank; the forecast then decides."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from sartor.kernels.attend import LONGEST, suits
from sartor.kernels.attention import NAME as SEGMENTS
from sartor.model import dissect, outline
from sartor.parallel import Layout
from sartor.plan.setting import Setting, largest_steps
from sartor.plan.strategy import Strategy
from sartor.plan.timing import Timing
from sartor.predict import count_trained
from sartor.predict.contents import Contents, Scores
from sartor.predict.operations import Group, Operation, Operations, Segment
from sartor.predict.shapes import Shape, blank_batch, pieces
from sartor.predict.sketch import ROWS, Sketch
from sartor.predict.target import Target
from sartor.predict.time import TimeForecast
from sartor.predict.whole import trace_job
from sartor.step import Precision
from sartor.step.blockwise import moment_bytes

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
_REDUCED = 4
"""Bytes of a gradient's element where FSDP2 reduces it."""
_SPLIT = ("matmul", "attention", "elementwise", "transcendental", "softmax", "optimizer")
"""Families of operators that tensor parallelism shares out."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Parameters of the whole model."""

    total: int
    trained: int
    block: int
    """Of the largest block, which FSDP2 gathers at once."""
    root: int
    """Outside of blocks."""
    width: int
    """Of the hidden states that blocks pass on."""


class Estimator:
    """Estimates for one setting. Raises NotComparable, or what a model's code raises under tracing."""

    def __init__(self, setting: Setting, timing: Timing) -> None:
        self.setting, self.timing = setting, timing
        self._sketch = cache(self._traced)

    def bytes(self, strategy: Strategy) -> int:
        """Allocated bytes on the fullest device."""
        if strategy.recomputed is not None:
            return round(self._between(strategy, *map(self.bytes, _ends(strategy))))
        sketch, accumulated = self._sketch_of(strategy), self._accumulated(strategy)
        if strategy.layout.devices == 1:
            return sketch.peak_bytes(strategy.micro_batch, accumulated=accumulated)
        return self._sharded_bytes(sketch, strategy, accumulated=accumulated)

    def others(self, strategy: Strategy) -> tuple[int, int]:
        """Bytes of what is no weight, gradient or optimizer state, at most: in the passes, and in the update. Of one device."""
        return self._sketch_of(strategy).activation_peaks(strategy.micro_batch)

    def time(self, strategy: Strategy) -> TimeForecast:
        """The time of a step, and what follows; where a part of the blocks recomputes, in proportion."""
        if strategy.recomputed is not None:
            none, full = map(self.time, _ends(strategy))
            seconds = self._between(strategy, none.step_seconds, full.step_seconds)
            return dataclasses.replace(full, step_seconds=seconds)
        positions = self.timing.workload(strategy).average.positions
        operations = self._sketch_of(strategy).operations(positions / self._shape.width)
        if strategy.layout.devices > 1:
            operations = self._laid_out(operations, strategy)
        stages = dict.fromkeys(range(1), operations)
        layout = strategy.layout
        if layout.pipeline > 1:  # as if the stages were one after the other without a bubble
            strategy = dataclasses.replace(strategy, layout=dataclasses.replace(layout, pipeline=1))
        return self.timing.forecast(strategy, stages, traced=self._contents(positions))

    def _between(self, strategy: Strategy, none: float, full: float) -> float:
        """What grows with every block that recomputes."""
        assert strategy.recomputed is not None, "some do"
        return none + (full - none) * strategy.recomputed / self.setting.blocks

    def _accumulated(self, strategy: Strategy) -> bool:
        return self.setting.order.global_batch > strategy.micro_batch * strategy.layout.data * strategy.processes

    def _sketch_of(self, strategy: Strategy) -> Sketch:
        return self._sketch(strategy.recompute, strategy.attention, strategy.layout.devices > 1, strategy.processes)

    def _traced(self, recompute: bool, attention: str | None, several: bool, processes: int) -> Sketch:
        setting, shape = self.setting, self._shape
        precision = setting.precision
        if several:  # FSDP2 gathers weights in the format of the arithmetic
            compute = self._computed
            precision = Precision(mode=precision.mode, weights=compute, trained=compute, compute="as-stored")
        packing = setting.packing
        if attention == SEGMENTS and not self._compiled_attention:
            # It has as many operators as a micro-batch has examples. PyTorch's own causal attention stands for it, which keeps
            # and computes about as much where no mask tells examples apart.
            attention, packing = None, False
        traces = [
            trace_job(
                setting.job,
                setting.source,
                [blank_batch(dataclasses.replace(shape, rows=rows), packing=packing, longest=LONGEST)],
                Target.of(setting.machine.device),
                precision=precision,
                recompute=recompute,
                attention=attention,
                processes=processes,
                sketch=True,
            )
            for rows in ROWS
        ]
        return Sketch(traces)

    @property
    def _compiled_attention(self) -> bool:
        """Whether one operator attends to all examples of a micro-batch."""
        dtype = getattr(torch, self._computed)
        return suits(torch.empty(0, dtype=dtype)) and int(self.setting.sets.train.lengths.max()) <= LONGEST

    @cached_property
    def _shape(self) -> Shape:
        """Of the run's longest rows."""
        batch = largest_steps(self.setting.sets.train, self.setting.order, self._single).largest[0]
        return Shape(rows=1, width=batch.input_ids_RT.shape[1], kept=len(batch.kept_K))

    def _contents(self, positions: float) -> Contents:
        """Of so many positions in rows as they are traced."""
        shape = self._shape
        length = shape.width / pieces(shape.width, packing=self.setting.packing, longest=LONGEST)
        return Contents(
            positions,
            positions * shape.kept / shape.width,
            Scores(positions * length, length),
            Scores(positions * shape.width, shape.width),
        )

    @cached_property
    def _single(self) -> Strategy:
        """One row at a time."""
        setting = self.setting
        assert setting.job.data.max_length is not None, "a setting's job is resolved"
        return Strategy(
            device=setting.machine.device.torch_name,
            threads=setting.machine.threads,
            precision=setting.precision,
            packing=setting.packing,
            row_capacity=setting.job.data.max_length,
            micro_batch=1,
            recompute=False,
            attention=None,
        )

    @cached_property
    def _held(self) -> Held:
        setting = self.setting
        model = outline(setting.source, dtype=setting.precision.load_dtype(adapter=setting.method.adapter))
        total = sum(parameter.numel() for parameter in model.parameters())
        blocks = [
            sum(parameter.numel() for parameter in layer.parameters())
            for stack in dissect(model).stacks
            for layer in model.get_submodule(stack.path).children()
        ]
        trained = count_trained(setting.job, setting.source, setting.precision)
        width = int(getattr(getattr(model, "config", None), "hidden_size", 0) or 0)
        return Held(total=total, trained=trained, block=max(blocks, default=0), root=total - sum(blocks), width=width)

    def _sharded_bytes(self, sketch: Sketch, strategy: Strategy, *, accumulated: bool) -> int:
        """Shares of the states, the buffers that FSDP2 gathers into, and the activations of the passes."""
        layout, held, precision = strategy.layout, self._held, self.setting.precision
        passing, updating = sketch.activation_peaks(strategy.micro_batch)
        split = layout.context * (layout.tensor if layout.sequence else 2 * layout.tensor / (1 + layout.tensor))
        frozen, gathered = held.total - held.trained, self._gathered_width
        if self.setting.method.adapter:
            frozen = held.total
        stored = frozen * _WIDTH[precision.weights] + held.trained * _WIDTH[precision.trained]
        moments = held.trained * moment_bytes(self.setting.job.training.optimizer, _WIDTH[precision.trained])
        gradients = held.trained * _WIDTH[precision.trained] / (layout.shared if layout.zero >= 2 else 1)
        buffers = (held.root + 2 * held.block if layout.zero == 3 else held.total + held.block) * gathered
        if not self.setting.method.adapter:
            buffers += held.block * (gathered + _REDUCED)
        states = (stored + moments) / layout.shared / layout.tensor / layout.pipeline
        gradients /= layout.tensor * layout.pipeline
        in_passes = states + gradients * accumulated + buffers / layout.tensor + passing / split
        return int(max(in_passes, states + gradients + updating / layout.replicate / layout.shared / layout.tensor))

    @property
    def _computed(self) -> str:
        """The format of the arithmetic."""
        precision = self.setting.precision
        return precision.weights if precision.compute == "as-stored" else precision.compute

    @property
    def _gathered_width(self) -> int:
        return _WIDTH[self._computed]

    def _laid_out(self, operations: Operations, strategy: Strategy) -> Operations:
        """The operators of one device, and what it sends."""
        layout, held = strategy.layout, self._held
        table = [_shared(operation, layout) for operation in operations.table]
        messages = _Messages(table)
        block = held.block // layout.tensor * self._gathered_width
        reduced = 0 if self.setting.method.adapter else held.block // layout.tensor * _REDUCED
        hidden = strategy.micro_batch * self._shape.width * held.width * self._gathered_width
        segments = []
        for part in operations.segments:
            counts = part.counts.copy()
            if part.unit >= 0 and part.kind != "update":
                again = part.kind in ("backward", "recompute") and layout.zero == 3
                if layout.shared > 1 and (part.kind == "forward" or (again and not _recomputed(operations, part))):
                    counts[messages.place("all_gather", block, Group(layout.shared, layout.tensor, overlaps=True))] += 1
                if layout.wrapped and part.kind == "backward" and reduced:
                    name = "reduce_scatter" if layout.shared > 1 else "all_reduce"
                    counts[messages.place(name, reduced, Group(layout.shared, layout.tensor, overlaps=True))] += 1
                    if layout.replicate > 1:
                        outer = Group(layout.replicate, layout.tensor * layout.shared, overlaps=True)
                        counts[messages.place("all_reduce", reduced // layout.shared, outer)] += 1
                if layout.tensor > 1 and part.kind != "recompute":
                    counts[messages.place("all_reduce", hidden, Group(layout.tensor, 1))] += 2
            segments.append(dataclasses.replace(part, counts=counts))
        return Operations(table=messages.table, segments=segments)


def _ends(strategy: Strategy) -> tuple[Strategy, Strategy]:
    """The same without any recomputation, and with all."""
    return (
        dataclasses.replace(strategy, recompute=False, recomputed=None),
        dataclasses.replace(strategy, recomputed=None),
    )


class _Messages:
    """Collectives, added to a table of operations."""

    def __init__(self, table: list[Operation]) -> None:
        self.table = table
        self._places: dict[tuple[str, int, Group], int] = {}

    def place(self, name: str, size_bytes: int, group: Group) -> int:
        key = name, size_bytes, group
        if key in self._places:
            return self._places[key]
        operation = Operation(
            name=name,
            family="collective",
            dtype="bfloat16",
            flops=0,
            read_bytes=size_bytes,
            written_bytes=size_bytes,
            made_bytes=0,
            group=group,
        )
        self.table.append(operation)
        self._places[key] = len(self.table) - 1
        return self._places[key]


def _recomputed(operations: Operations, part: Segment) -> bool:
    """Whether weights are gathered for the recomputation already, when this part of a backward pass begins."""
    return part.kind == "backward" and any(other.kind == "recompute" and other.unit == part.unit for other in operations.segments)


def _shared(operation: Operation, layout: Layout) -> Operation:
    """A tensor or context parallel rank's part of an operator; an optimizer's part is its shard."""
    ranks = layout.tensor * (layout.shared if operation.family == "optimizer" else layout.context)
    if ranks == 1 or operation.family not in _SPLIT:
        return operation
    changed = {name: getattr(operation, name) // ranks for name in ("flops", "read_bytes", "written_bytes", "made_bytes")}
    sizes = operation.sizes
    if operation.family == "matmul" and len(sizes) == 4:
        sizes = (sizes[0], max(sizes[1] // layout.context, 1), max(sizes[2] // layout.tensor, 1), sizes[3])
    elif operation.family == "optimizer" and sizes:
        sizes = (max(sizes[0] // ranks, 1), *sizes[1:])
    return dataclasses.replace(operation, **changed, sizes=sizes)
