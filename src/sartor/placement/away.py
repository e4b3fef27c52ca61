"""Weights and optimizer state that are away can be looked at all the same: an operator that touches them brings them.

While a chunk is not in use, its tensors have one of the classes below. They are the same objects, only their class changes; in
use they are ordinary tensors, and nothing is in the way. Views of such a tensor bring its chunk as well, however late they are
read.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sartor.errors import UsageError


class Home(Protocol):
    """Where a tensor belongs."""

    def look(self, others: Sequence[Any]) -> None:
        """It is on the device when this returns, and so are the others."""
        ...

    def changed(self) -> None:
        """Somebody wrote to it."""
        ...


_HOMES: weakref.WeakValueDictionary[int, Home] = weakref.WeakValueDictionary()
"""By the address of a storage, of which the home holds a tensor."""
_WITHOUT_VALUES = frozenset([
    "size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "is_contiguous", "data_ptr", "untyped_storage",
    "storage_offset", "get_device", "is_floating_point", "is_complex", "is_same_size", "requires_grad_", "register_hook",
    "register_post_accumulate_grad_hook", "retain_grad", "_is_view", "__len__", "empty_like", "zeros_like", "ones_like",
    "full_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided",
])  # fmt: skip
_SAME = frozenset(["data", "detach"])
"""What gives the same values in the same order."""
_VIEWS = frozenset(["T", "mT", "H", "mH", "real", "imag"])
"""Attributes that are tensors of the same values: made of a storage that is there."""
_EXPORTS = frozenset(["numpy", "__array__", "__dlpack__", "__repr__"])
"""What hands out memory that must stay, or tells of classes."""
_REFUSED = {
    "__reduce_ex__": ("weights of a placed model cannot be pickled", "save `model.state_dict()` or use `save_pretrained`"),
    "data": (
        "the memory of a placed model's weights cannot be exchanged",
        "write into it: `weight.copy_(values)` under torch.no_grad(), or call `optimizer.release()` first",
    ),
}


class _Away:
    """A tensor whose storage may be empty."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kind = _named(func)
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if name in _REFUSED and kind != "__get__" and not (kind and _same_memory(*args)):
                what, remedy = _REFUSED[name]
                raise UsageError(what, why="they come and go between memory and a lower tier", remedy=remedy)
            if name in _SAME and kind != "__set__":
                return pytree.tree_map_only(Tensor, _guarded, func(*args, **kwargs))
            if (kind and name not in _VIEWS) or name in _WITHOUT_VALUES:
                return func(*args, **kwargs)
            away, homes = _homes((args, kwargs))
            versions = [_version(tensor) for tensor in away]
            if homes:
                homes[0].look(homes[1:])
            if name in _EXPORTS:
                args = (args[0].detach().clone().requires_grad_(args[0].requires_grad), *args[1:])
            result = func(*args, **kwargs)
            for tensor, version in zip(away, versions, strict=True):
                home = home_of(tensor)
                if home is not None and _version(tensor) != version:
                    home.changed()
            return pytree.tree_map_only(Tensor, _guarded, result)


class AwayTensor(_Away, Tensor):
    """Optimizer state, or a view of weights."""

    def __deepcopy__(self, memo: Any) -> Tensor:
        memo[id(self)] = made = self.detach().clone()
        return made


class AwayParameter(_Away, nn.Parameter):
    """A weight."""

    def __deepcopy__(self, memo: Any) -> nn.Parameter:
        memo[id(self)] = made = nn.Parameter(self.detach().clone(), requires_grad=self.requires_grad)
        return made


def register(tensor: Tensor, home: Home) -> None:
    """The tensor belongs to `home`, and may be away from now on."""
    _HOMES[tensor.untyped_storage()._cdata] = home
    hide(tensor)


def forget(tensor: Tensor) -> None:
    """It is an ordinary tensor again."""
    show(tensor)
    _HOMES.pop(tensor.untyped_storage()._cdata, None)


def hide(tensor: Tensor) -> None:
    """From here on, who touches the tensor brings it."""
    if type(tensor) is nn.Parameter:
        tensor.__class__ = AwayParameter
    elif type(tensor) is Tensor:
        tensor.__class__ = AwayTensor


def show(tensor: Tensor) -> None:
    """The tensor is on the device, and in use."""
    if type(tensor) is AwayParameter:
        tensor.__class__ = nn.Parameter  # type: ignore[assignment]
    elif type(tensor) is AwayTensor:
        tensor.__class__ = Tensor  # type: ignore[assignment]


def home_of(tensor: Tensor) -> Home | None:
    """Of the tensor, or of what it is a view of."""
    with torch._C.DisableTorchFunctionSubclass():
        return _HOMES.get(tensor.untyped_storage()._cdata)


def _named(func: Any) -> tuple[str, str]:
    """The name of a function or attribute, and `__get__` or `__set__` for an attribute."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        owner = func.__self__
        return getattr(owner, "__name__", "") or getattr(getattr(owner, "fget", None), "__name__", ""), name
    return name, ""


def _same_memory(tensor: Tensor, value: Tensor) -> bool:
    """Whether `value` is what the tensor has already, as in `model.to(device)`."""
    return bool(tensor.untyped_storage()._cdata == value.untyped_storage()._cdata)


def _homes(values: Any) -> tuple[list[Tensor], list[Home]]:
    """The tensors that may be away, and the homes of everything, gradients too."""
    away: list[Tensor] = []
    homes: dict[int, Home] = {}
    for leaf in pytree.tree_leaves(values):
        if not isinstance(leaf, Tensor):
            continue
        home = home_of(leaf) if isinstance(leaf, _Away) else getattr(leaf, "home", None)
        if home is not None:
            homes[id(home)] = home
            if isinstance(leaf, _Away):
                away.append(leaf)
    return away, list(homes.values())


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _guarded(tensor: Tensor) -> Tensor:
    """A view of what may go brings it."""
    if type(tensor) is Tensor and _HOMES and tensor.layout is torch.strided and home_of(tensor) is not None:
        hide(tensor)
    return tensor
