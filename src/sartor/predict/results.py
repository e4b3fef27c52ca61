"""What operators return on fake tensors, found once for each operator and shapes.

Asked for a result, PyTorch's fake tensors run the operator's shape rule, or look it up by all that could ever matter to one: 50
microseconds, ten thousand times a trace. Of the dense tensors of a training step the result follows from shapes, strides, formats
and plain numbers; where these were seen before, it is made at once, in a tenth of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Parameter

from sartor.predict.operators import tensors_of
from sartor.predict.plain_results import PLAIN, ask, is_fresh

_CPU, _META = torch.device("cpu"), torch.device("meta")
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
_COMPLEX = frozenset({torch.complex32, torch.complex64, torch.complex128})
"""They may be conjugated without a trace in shape or strides."""
_MASKS = frozenset({torch.bool, torch.int8, torch.uint8})
"""Formats of an index that says by its values how many elements it takes."""
_CHANGING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
"""Results follow from values, or an operand looks different afterwards."""
_INDEX = torch.ops.aten.index.Tensor
_SPACES = ("aten", "prims", "fsdp", "sartor")
"""PyTorch's own operators, but for collectives, which give more than tensors, and ours."""


class _NotAlike(Exception):
    """Two calls with the same key need not have the same results."""


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor to make: with a storage of its own, or as a view of the operand at `source`."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    source: int | None


@dataclass(frozen=True, slots=True)
class _Recipe:
    """A call's results: each a tensor to make, the place of an operand that is returned, or nothing."""

    parts: tuple[_Made | int | None, ...]
    container: type | None
    """List or tuple; None for a single result."""


_RECIPES: dict[Any, _Recipe | None] = {}
"""By key; None for calls that have to run. For all traces of this process, as PyTorch's own memory of results is."""


def fake_mode() -> FakeTensorMode:
    """A mode for a trace, without a memory of its own: what it is asked, it is asked once."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.cache_enabled = False
    return mode


class Results:
    """Results of operators on the tensors of one fake mode."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        with torch._C._DisableTorchDispatch():
            self._state = dict(vars(FakeTensor(mode, torch.empty(0, device=_META), _CPU)))

    def key(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the call's results follow from; None where that cannot be said."""
        if not _is_constant(func) or torch.is_inference_mode_enabled():
            return None
        try:
            key = [func, torch.get_default_dtype(), *map(self._look, args)]
            for name, value in kwargs.items():
                key += name, self._look(value)
        except _NotAlike:
            return None
        if _makes_view(func):  # of a storage that may have been given back
            if type(args[0]) is not FakeTensor:
                return None
            key.append(args[0].untyped_storage().nbytes())
        elif func is _INDEX and any(index is not None and index.dtype in _MASKS for index in args[1]):
            return None
        return tuple(key)

    def of(self, key: Any, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """The results of the call with this key, which `run` finds where they are not known."""
        recipe = _RECIPES.get(key)
        if recipe is None and key not in _RECIPES and key[0] in PLAIN:
            recipe = self._plain_recipe(key[0], args, kwargs)
            if recipe is not None:
                _RECIPES[key] = recipe
        if recipe is not None:
            made = [self._make(part, args) for part in recipe.parts]
            return made[0] if recipe.container is None else recipe.container(made)
        result = run(*args, **kwargs)
        if key not in _RECIPES:
            try:
                _RECIPES[key] = self._recipe(key[0], args, kwargs, result)
            except _NotAlike:
                _RECIPES[key] = None
        return result

    def _look(self, value: Any) -> Any:
        kind = type(value)
        if kind is FakeTensor:
            dtype = value.dtype
            if value.fake_mode is not self._mode or value.constant is not None or dtype in _COMPLEX:
                raise _NotAlike
            return value.shape, value.stride(), dtype, value.storage_offset()
        if kind in _PLAIN:
            return kind, value  # 1, 1.0 and True are equal
        if kind is list or kind is tuple:
            return kind, *map(self._look, value)
        if (kind is Tensor or kind is Parameter) and value.is_meta:  # a model that is about to be made
            return kind, value.shape, value.stride(), value.dtype
        raise _NotAlike

    def _make(self, part: _Made | int | None, args: Any) -> Tensor | None:
        if part is None:
            return None
        if isinstance(part, int):
            operand: Tensor = args[part]
            return operand
        storage = None if part.source is None else args[part.source].untyped_storage()
        with torch._C._DisableTorchDispatch():
            if storage is None:
                inner = torch.empty_strided(part.shape, part.stride, dtype=part.dtype, device=_META)
            else:
                inner = torch.empty(0, dtype=part.dtype, device=_META)
                inner.set_(storage, part.offset, part.shape, part.stride)
        # As FakeTensor's constructor does it (PyTorch 2.13, torch/_subclasses/fake_tensor.py), but for its many questions.
        made = Tensor._make_subclass(FakeTensor, inner, False, dispatch_device=True, device_for_backend_keys=_CPU)
        torch._C._set_throw_on_mutable_data_ptr(made)
        made.__dict__.update(self._state)
        return made

    def _plain_recipe(self, func: Any, args: Any, kwargs: dict[str, Any]) -> _Recipe | None:
        """How to make the results of a plain operator; None where it takes other operands than it does as a rule."""
        operands = list(tensors_of((args, kwargs)))
        if not all(type(operand) is FakeTensor for operand in operands) or kwargs.get("device", _CPU) not in (_CPU, None):
            return None
        try:
            result, given = ask(func, args, kwargs)
        except Exception:  # what is wrong with it, the fake tensors say
            return None
        container = type(result) if isinstance(result, list | tuple) else None
        results = [result] if container is None else list(result)
        if container not in (None, list, tuple):
            return None
        others = {_storage_of(operand) for operand in operands}
        try:
            return _Recipe(tuple(_plain_part(one, given, others, viewed=_makes_view(func)) for one in results), container)
        except _NotAlike:
            return None

    def _recipe(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> _Recipe:
        """How to make such results. Raises _NotAlike where they would not be the same."""
        container = type(result) if isinstance(result, list | tuple) else None
        results = [result] if container is None else list(result)
        if container not in (None, list, tuple):
            raise _NotAlike
        parts = [_part_of(one, args, viewed=_makes_view(func)) for one in results]
        pairs = list(zip(results, parts, strict=True))
        own = [_storage_of(one) for one, part in pairs if isinstance(part, _Made) and part.source is None]
        others = {_storage_of(tensor) for tensor in tensors_of((args, kwargs))}
        if len(set(own) - others) < len(own) or not all(_same(one, self._make(part, args)) for one, part in pairs):
            raise _NotAlike
        return _Recipe(tuple(parts), container)


def _part_of(result: Any, args: Any, *, viewed: bool) -> _Made | int | None:
    """What one result is. Raises _NotAlike for what is not made here."""
    if result is None:
        return None
    for place, arg in enumerate(args):
        if arg is result:
            return place
    if type(result) is not FakeTensor or result.constant is not None or result.requires_grad or result.fake_device != _CPU:
        raise _NotAlike
    source = 0 if viewed and _storage_of(result) == _storage_of(args[0]) else None
    return _Made(tuple(result.shape), result.stride(), result.dtype, int(result.storage_offset()), source)


def _plain_part(result: Any, args: Any, others: set[int], *, viewed: bool) -> _Made | int | None:
    """What one result of a plain operator on stand-ins is. Raises _NotAlike for what is not made here."""
    if result is None:
        return None
    place = next((place for place, arg in enumerate(args) if arg is result), None)
    if place is not None:
        return place
    storage = _storage_of(result)
    source = 0 if viewed and storage == _storage_of(args[0]) else None
    if source is None and (storage in others or not is_fresh(result)):
        raise _NotAlike
    return _Made(tuple(result.shape), result.stride(), result.dtype, int(result.storage_offset()), source)


def _same(one: Any, other: Any) -> bool:
    """Whether two results cannot be told apart, but for their storages' names."""
    if one is other:
        return True
    return all(
        look(one) == look(other)
        for look in (Tensor.size, Tensor.stride, Tensor.storage_offset, _bytes_of, torch._C._dispatch_key_set)
    )


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


@functools.cache
def _is_constant(func: Any) -> bool:
    """Whether an operator of PyTorch or of ours gives the same kind of result for the same kind of operands."""
    if func is _INDEX:
        return True
    space, _, name = func._schema.name.partition("::")
    return space in _SPACES and not name.startswith("lift") and not any(tag in func.tags for tag in _CHANGING)


@functools.cache
def _makes_view(func: Any) -> bool:
    """Whether results may be views of the first operand."""
    return bool(func.is_view) or func is torch.ops.aten._unsafe_view.default
