"""The storage tracker: every allocation and release of what runs under it, on fake tensors or on real ones."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sartor.kernels.fuse import watching
from sartor.kernels.loss import linear_cross_entropy_
from sartor.model.regions import Reduction
from sartor.predict.fused import extent_of
from sartor.predict.in_place import adds_up_in_place, lone_holders
from sartor.predict.ledger import OUTSIDE, Event, Ledger
from sartor.predict.notes import Notebook, functions_noted
from sartor.predict.operators import is_silent, tensors_of
from sartor.predict.results import Results
from sartor.predict.target import Target

_WRAPPERS = ("DTensor", "AsyncCollectiveTensor")
_DEVICE = torch.ops.prim.device.default
_WAIT = torch.ops._c10d_functional.wait_tensor.default
_VALUE = torch.ops.aten._local_scalar_dense.default
_ADD = torch.ops.aten.add.Tensor
_GROUPED_MM = torch.ops.aten._grouped_mm.default


class StorageTracker(TorchDispatchMode):
    """Follows every storage from the first operator that returns it until it dies. Works on fake and on real tensors."""

    def __init__(self, *, packed: bool = False, target: Target | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._notebook = Notebook()
        self.ledger = Ledger(operations=self._notebook.operations)
        self.phase = "build"
        self._modules: list[str] = []
        self._packed = packed
        self._unit = OUTSIDE
        self._units: dict[int, int] = {}
        self._backward = False
        self._by_parameter = False
        self._created: dict[int, int] = {}
        self._blind = self._closed = self._leaving = False
        self._target = target or Target(kind="cpu")
        lone_holders()  # asked before a backward pass runs
        self._sizes: dict[int, int] = {}
        self._serials: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch would wrap each call in guards against its compiler, which does not run here

    def __enter__(self) -> Self:
        self._fake_mode = active_fake_mode()
        self._results = None if self._fake_mode is None else Results(self._fake_mode)
        return super().__enter__()  # type: ignore[no-untyped-call, no-any-return]

    def functions_noted(self) -> contextlib.AbstractContextManager[None]:
        """A context that counts the nodes of functions written in Python."""
        return functions_noted(self._notebook)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # the most frequent question, and it makes nothing
            return args[0].fake_device if type(args[0]) is FakeTensor else func(*args)
        for kind in types:
            if kind is not FakeTensor and kind.__name__ in _WRAPPERS:
                return NotImplemented  # it comes again, with the local tensors
        kwargs = kwargs or {}
        if func.namespace == "profiler":  # FSDP2 and optimizers say what they are at
            with torch._C._DisableTorchDispatch():
                return func(*args, **kwargs)
        if self._blind:
            key = None if self._results is None else self._results.key(func, args, kwargs)
            return func(*args, **kwargs) if key is None or self._results is None else self._results.of(key, func, args, kwargs)
        if func is _WAIT:
            return args[0] if _is_fake(args[0]) else func(*args)  # PyTorch's shape rule makes a new tensor, the real one does not
        if self._leaving:
            self._leaving, self._unit = False, OUTSIDE
        if func is _VALUE and _is_fake(args[0]):
            # The one question that models ask of values while they build the mask: is there a single segment a row?
            return not self._packed
        key = None if self._results is None else self._results.key(func, args, kwargs)
        result = self._run(func, args, kwargs, key)
        scratch = self._target.transient_bytes(func, args)
        leaves = [leaf for leaf in tensors_of(result) if not self._is_foreign(leaf)]
        units = self._units_of_results(args, len(leaves)) if self._by_parameter else None
        for place, leaf in enumerate(leaves):
            self.see(leaf, unit=units[place] if units else None)
        if not self._closed:
            self._note(func, args, kwargs, result, key)
            if torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
                self._notebook.note_node()
        if scratch:
            self._note_scratch(scratch)
        if func is linear_cross_entropy_.overload:
            self.ledger.workspaces[self.see(args[4])] = extent_of(args)
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any], key: Any) -> Any:
        """The operator's results; `key` as in `Results`."""
        if func is _ADD and adds_up_in_place(args[0], args[1]):
            return args[0] if _is_fake(args[0]) else args[0].add_(args[1])
        wide = func is _GROUPED_MM and _is_fake(args[0]) and args[0].dtype != torch.bfloat16
        run = _grouped_mm if wide else func
        return run(*args, **kwargs) if key is None or self._results is None else self._results.of(key, run, args, kwargs)

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, key: Any) -> None:
        """Note what the operator computes; over lists of parameters, each one's share, for the unit that it belongs to."""
        if is_silent(func):
            if func.is_view and not self._by_parameter:
                self._notebook.note_view(phase=self.phase, unit=self._unit)
            return
        if self._by_parameter and _is_list(args):
            self._notebook.note_list(func, args, kwargs, phase=self.phase, units=[self.unit_of(tensor) for tensor in args[0]])
            return
        unit = self._unit
        if self._by_parameter:
            tensor = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
            unit = OUTSIDE if tensor is None else self.unit_of(tensor)
        self._notebook.note(func, args, kwargs, result, phase=self.phase, unit=unit, key=key)

    def _is_foreign(self, tensor: torch.Tensor) -> bool:
        """Whether it is a fake tensor of somebody else's (DTensor asks for shapes that way): it has no memory."""
        return _is_fake(tensor) and tensor.fake_mode is not self._fake_mode  # type: ignore[attr-defined]

    def see(self, tensor: torch.Tensor, *, unit: int | None = None) -> int:
        """Note the tensor's storage, if it is new; return its serial number in the ledger."""
        storage = _storage(tensor)
        key = storage._cdata
        if key not in self._sizes:
            self._track(storage, self._count, self._unit if unit is None else unit)
            self._count += 1
            self._append(self._serials[key], storage.nbytes(), self._units[key])
        return self._serials[key]

    def _track(self, storage: torch.UntypedStorage, serial: int, unit: int) -> None:
        key = storage._cdata
        self._sizes[key], self._serials[key], self._units[key] = storage.nbytes(), serial, unit
        self._created[key] = len(self.ledger.events)
        self._watched[key] = weakref.ref(storage, lambda _: self._free(key))

    def resized(self, tensor: torch.Tensor) -> None:
        """A storage that is known has another size now."""
        storage = _storage(tensor)
        key = storage._cdata
        if key not in self._sizes:
            self.see(tensor)
            return
        change = storage.nbytes() - self._sizes[key]
        if change:
            self._sizes[key] = storage.nbytes()
            self._append(self._serials[key], change, self._unit if self._unit != OUTSIDE else self._units[key])

    def begin(self, phase: str, *, by_parameter: bool = False) -> None:
        """A new phase; no module of the last one runs on. `by_parameter`: it goes through parameters, not through modules."""
        self.phase = phase
        self._modules.clear()
        self._unit = OUTSIDE
        self._by_parameter = by_parameter

    def belongs(self, tensor: torch.Tensor, unit: int) -> None:
        """Say to which unit a storage belongs, whenever it was made."""
        self.see(tensor)
        key = _storage(tensor)._cdata
        self._units[key] = unit
        at = self._created[key]
        self.ledger.events[at] = self.ledger.events[at]._replace(unit=unit)

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """What is made in this context is not noted."""
        self._blind = True
        try:
            yield
        finally:
            self._blind = False

    def repeat(self, phase: str, name: str) -> dict[int, int]:
        """Note the events of an earlier phase once more, as those of phase `name`. What it made and left alive → its copy."""
        self.begin(name)
        self._notebook.repeat(phase, name)
        copies: dict[int, int] = {}
        alive: dict[int, int] = {}
        for event in [event for event in self.ledger.events if event.phase == phase]:
            if event.size_bytes >= 0 and event.storage not in copies:
                copies[event.storage] = alive[event.storage] = self._count
                self._count += 1
                for known in (self.ledger.kinds, self.ledger.workspaces):
                    if event.storage in known:
                        known[copies[event.storage]] = known[event.storage]  # type: ignore[assignment]
            if event.storage not in copies:
                continue  # made before the phase; it can be freed once only
            if event.size_bytes < 0:
                alive.pop(event.storage, None)
            self.ledger.events.append(event._replace(storage=copies[event.storage], phase=name))
        return alive

    def alive(self) -> set[int]:
        """Serial numbers of the storages that live now."""
        return set(self._serials.values())

    def repeat_micro_batch(self, start: int, end: int, gradients: dict[int, int]) -> list[int]:
        """Note the events of a micro-batch, `start` to `end`, once more; what they leave alive is returned.

        `gradients`: serial number → the event before which it was added to what was there, where its copy goes.
        """
        copies: dict[int, int] = {}
        alive: dict[int, Event] = {}
        gone: dict[int, list[int]] = {}
        for serial, when in gradients.items():
            gone.setdefault(when, []).append(serial)
        for place in range(start, end + 1):
            for serial in gone.get(place, ()):
                made = alive.pop(serial)
                self.ledger.events.append(made._replace(size_bytes=-made.size_bytes, module=""))
            if place == end:
                break
            event = self.ledger.events[place]
            if event.storage not in copies:
                copies[event.storage] = self._count
                self._count += 1
            copy = event._replace(storage=copies[event.storage])
            self.ledger.events.append(copy)
            if event.size_bytes < 0:
                del alive[event.storage]
            else:
                alive[event.storage] = copy
        return [event.storage for event in alive.values()]

    def adopt(self, tensor: torch.Tensor, serial: int) -> None:
        """From now on this tensor, unseen so far, is the storage that `repeat` noted under this number."""
        at = next(at for at in reversed(range(len(self.ledger.events))) if self.ledger.events[at].storage == serial)
        storage = _storage(tensor)
        self._track(storage, serial, self.ledger.events[at].unit)
        self._created[storage._cdata] = at

    def forget(self, tensors: Iterable[torch.Tensor]) -> None:
        """Note the end of tensors that are gone for the step, though somebody still holds them."""
        for key in {_storage(tensor)._cdata for tensor in tensors}:
            self._free(key)

    def release(self, serials: Iterable[int]) -> None:
        """Note the end of storages that `repeat` noted and nobody adopted."""
        made = {event.storage: event for event in self.ledger.events if event.size_bytes >= 0}
        for serial in serials:
            self._append(serial, -made[serial].size_bytes, made[serial].unit)

    def unit_of(self, tensor: torch.Tensor) -> int:
        """The unit to which a storage belongs."""
        return self._units.get(_storage(tensor)._cdata, OUTSIDE)

    def mark(self, tensors: Iterator[torch.Tensor] | Sequence[torch.Tensor], kind: str) -> None:
        """Say what these tensors' storages are."""
        for tensor in tensors:
            self.ledger.kinds[self.see(tensor)] = kind

    def follow(self, model: nn.Module, reduction: Reduction | None = None) -> None:
        """Note which module and which unit runs, from now on, for as long as the model lives."""
        if reduction is not None and reduction.units:
            model.register_forward_pre_hook(lambda *_: self._enter_forward(), prepend=True)
            for tag, layers in reduction.units.items():
                layers[0].register_forward_pre_hook(lambda *_, tag=tag: self._enter(tag), prepend=True)
                for layer in layers:
                    layer.register_forward_hook(lambda _, inputs, output, tag=tag: self._watch(output, tag), prepend=True)
                if not reduction.continues(tag):  # what follows on a unit belongs to it, until another one begins
                    layers[-1].register_forward_hook(lambda *_: self._leave_units())
            for layer in reduction.singles:
                layer.register_forward_hook(lambda _, inputs, output: self._watch(output, OUTSIDE), prepend=True)
        for path, module in model.named_modules():
            if path:
                module.register_forward_pre_hook(watching(lambda *_, path=path: self._modules.append(path)))
                module.register_forward_hook(watching(lambda *_: self._leave()), always_call=True)

    def _leave(self) -> None:
        # Recomputation stops a block early, by an exception that hooks of its inner modules may not see.
        if self._modules:
            self._modules.pop()
        if self._leaving and not self._modules:  # the outermost module is over, and no operator told so
            self._leaving, self._unit = False, OUTSIDE

    def _enter_forward(self) -> None:
        self._backward, self._unit = False, OUTSIDE

    def _enter(self, tag: int) -> None:
        if not self._backward:  # a recomputation is part of its unit's backward
            self._leaving, self._unit = False, tag

    def _leave_units(self) -> None:
        """The last unit of a row has returned: what is freed before anything else runs is still its doing."""
        self._leaving = not self._backward

    def _watch(self, output: Any, tag: int) -> None:
        """When the gradient of a layer's output is there, the layer's backward begins."""
        hidden = output[0] if isinstance(output, tuple) else output
        if not self._backward and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: self._turn(tag))

    def _turn(self, tag: int) -> None:
        self._leaving, self._backward, self._unit = False, True, tag

    def _units_of_results(self, args: Any, count: int) -> list[int] | None:
        """Operators over lists give the n-th result for the n-th parameter; others belong to their first tensor's unit."""
        first = next((arg for arg in args if isinstance(arg, torch.Tensor | list | tuple) and not _is_plain(arg)), None)
        if first is None:
            return None
        if isinstance(first, torch.Tensor):
            return [self.unit_of(first)] * count
        return [self.unit_of(tensor) for tensor in first] if len(first) == count else None

    def close(self) -> None:
        """The ledger is complete: what dies from now on is not noted."""
        self._closed = True
        self._watched.clear()

    def _free(self, key: int) -> None:
        if self._closed or key not in self._sizes:  # or it was forgotten before it died
            return
        own = self._units.pop(key)
        del self._created[key], self._watched[key]
        unit = own if self._unit == OUTSIDE else self._unit
        self._append(self._serials.pop(key), -self._sizes.pop(key), unit)

    def _note_scratch(self, size_bytes: int) -> None:
        """Memory that came and went inside an operator, beside its results."""
        for size in (size_bytes, -size_bytes):
            self._append(self._count, size, self._unit)
        self._count += 1

    def _append(self, serial: int, size_bytes: int, unit: int) -> None:
        module = self._modules[-1] if self._modules else ""
        self.ledger.events.append(Event(serial, size_bytes, self.phase, module, unit))


def _grouped_mm(first: torch.Tensor, second: torch.Tensor, *rest: Any, **kwargs: Any) -> torch.Tensor:
    """The experts' product in float32: the CPU computes it, but PyTorch's shape rule (2.13) knows bfloat16 only."""
    result: torch.Tensor = _GROUPED_MM(first.to(torch.bfloat16), second.to(torch.bfloat16), *rest, **kwargs)
    return result.to(first.dtype)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    """The storage on this device: of a DTensor, its local part's; of a collective's result that nobody waited for, its own."""
    local = getattr(tensor, "_local_tensor", tensor)
    return getattr(local, "elem", local).untyped_storage()


def _is_list(args: Any) -> bool:
    """Whether an operator's first operand is a list of tensors."""
    return bool(args) and isinstance(args[0], list | tuple) and not _is_plain(args[0])


def _is_plain(value: Any) -> bool:
    """Whether an operator's argument is a list that holds no tensors (a shape)."""
    return isinstance(value, list | tuple) and not (value and all(isinstance(item, torch.Tensor) for item in value))


def _is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)
