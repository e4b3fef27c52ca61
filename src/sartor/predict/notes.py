"""Where the tracker notes operations while a step runs. What an operator computes is worked out once for each set of shapes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sartor.kernels.native import is_recorded
from sartor.predict.fused import parts_of
from sartor.predict.operations import VIEW, Operation, Operations, Segment
from sartor.predict.operators import describe, describe_one, is_collective, tensors_of

_NO_TASK = -1
_NORMS = ("_foreach_norm", "gradient_norm")
"""Over lists, and write nothing of their operands' size."""


class Notebook:
    """Operations in the making."""

    def __init__(self) -> None:
        self.operations = Operations()
        self._places: dict[Any, tuple[int, ...]] = {}
        self._known: dict[Any, tuple[int, ...]] = {}
        self._phase = self._kind = ""
        self._unit = self._micro_batch = 0
        self._current: Segment | None = None
        self._view: int | None = None
        self._updates: dict[tuple[str, int], Segment] = {}

    def note(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, *, phase: str, unit: int, key: Any = None) -> None:
        """The operator ran once on these operands. Calls with the same `key` are alike; None says nothing."""
        places = self._known.get(key) if key is not None else None
        if places is None:
            places = self._places_of(func, args, kwargs, result)
            if key is not None:
                self._known[key] = places
        kind = _kind_of(phase)
        for place in places:
            self._count(place, phase, kind, unit)

    def _places_of(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> tuple[int, ...]:
        """Of what the operator computes, in the table, which it enters where it is new."""
        if is_collective(func):  # its group is an object made for the call, which tells no calls apart
            operation = describe(func, args, kwargs, result)
            if operation not in self._places:
                self._places[operation] = self._add(operation)
            return self._places[operation]
        key = (func, *map(_key, args), *map(_key, kwargs.values()))
        if key not in self._places:
            parts = parts_of(func, args)
            self._places[key] = self._add(*([describe(func, args, kwargs, result)] if parts is None else parts))
        return self._places[key]

    def note_view(self, *, phase: str, unit: int) -> None:
        """A view was made."""
        if self._view is None:
            (self._view,) = self._add(VIEW)
        kind = _kind_of(phase)
        if kind == self._kind or kind != "forward":  # after a backward pass the loss is detached: no new micro-batch
            self._count(self._view, phase, kind, unit)

    def note_node(self) -> None:
        """Autograd recorded the operator that was noted last."""
        if self._current is not None:
            self._current.recorded += 1

    def note_list(self, func: Any, args: Any, kwargs: dict[str, Any], *, phase: str, units: Sequence[int]) -> None:
        """An operator over lists of equal length ran once: one entry for each place in the lists."""
        name = func._schema.name.rpartition("::")[2]
        lists = [value for value in args if isinstance(value, list | tuple) and len(value) == len(units)]
        writes = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
        ]
        changed = {id(tensor) for tensor in tensors_of(writes)}
        for at, unit in enumerate(units):
            tensors = [value[at] for value in lists if isinstance(value[at], Tensor)]
            written = [tensor for tensor in tensors if id(tensor) in changed] or ([] if name in _NORMS else tensors[:1])
            key = (func, *map(_key, tensors))
            if key not in self._places:
                self._places[key] = self._add(describe_one(name, tensors, written=written))
            for place in self._places[key]:
                self._count(place, phase, _kind_of(phase), unit)

    def repeat(self, phase: str, name: str) -> None:
        """An earlier phase happens once more, under another name."""
        segments = self.operations.segments
        segments += [dataclasses.replace(part, phase=name) for part in segments if part.phase == phase]
        self._phase = ""

    def _add(self, *operations: Operation | None) -> tuple[int, ...]:
        """Their places in the table."""
        made = [operation for operation in operations if operation is not None]
        self.operations.table += made
        return tuple(range(len(self.operations.table) - len(made), len(self.operations.table)))

    def _count(self, place: int, phase: str, kind: str, unit: int) -> None:
        if phase != self._phase or kind != self._kind or unit != self._unit:
            if phase != self._phase:
                self._micro_batch = 0
            elif kind == "forward" and self._kind != "forward":
                self._micro_batch += 1
            self._phase, self._kind, self._unit = phase, kind, unit
            self._current = self._segment(phase, kind, unit)
        assert self._current is not None, "a phase has a name"
        self._current.counts[place] += 1

    def _segment(self, phase: str, kind: str, unit: int) -> Segment:
        """A new one; an update goes through parameters in any order, and has one for each unit."""
        if kind == "update" and (phase, unit) in self._updates:
            return self._updates[phase, unit]
        segment = Segment(phase=phase, kind=kind, unit=unit, micro_batch=self._micro_batch)
        self.operations.segments.append(segment)
        if kind == "update":
            self._updates[phase, unit] = segment
        return segment


def _kind_of(phase: str) -> str:
    """The pass that is running. Autograd's engine computes without recording, and recomputation records inside of it."""
    if phase.endswith(("clip", "update")):
        return "update"
    if torch._C._current_graph_task_id() == _NO_TASK:
        return "forward"
    return "recompute" if is_recorded() else "backward"


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return value


@contextlib.contextmanager
def functions_noted(notebook: Notebook) -> Iterator[None]:
    """Count the nodes of autograd's functions written in Python, whose own operators autograd does not record."""
    usual = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **named: Any) -> Any:
        result = usual.__func__(cls, *args, **named)
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            notebook.note_node()
        return result

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = usual  # type: ignore[method-assign]
