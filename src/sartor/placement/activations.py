"""What autograd saves of a forward pass: weights are remembered by name, activations of chosen rows go to a lower tier."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sartor.placement.tiers import Copy, Mover, Tier

if TYPE_CHECKING:
    from sartor.placement.engine import Engine
from sartor.placement.live import LiveRow

SMALLEST = 2**12
"""Smaller storages stay: they cost more to move than they take."""


class _Weight:
    """A saved view of a row's weights, valid while they are on the device."""

    def __init__(self, tensor: Tensor, live: LiveRow) -> None:
        self.tensor, self.live = tensor, live


class _Saved:
    """A storage of the forward pass on a lower tier; gone from there when autograd lets go of it."""

    def __init__(self, storage: torch.UntypedStorage, tier: Tier, mover: Mover) -> None:
        self._tier, self._mover, self._device = tier, mover, storage.device
        self._region = tier.allocate(storage.nbytes())
        self._copies: Sequence[Copy] = mover.write(tier, self._region, storage)
        mover.leaving(self._copies, self._region.size, lambda storage=storage: None)  # type: ignore[misc]  # kept until written
        self._storage: torch.UntypedStorage | None = None

    def fetch(self) -> None:
        """Begin to bring it."""
        if self._storage is None:
            self._arrive()
            self._storage = torch.UntypedStorage(self._region.size, device=self._device)
            self._copies = self._mover.read(self._tier, self._region, self._storage)

    def get(self) -> torch.UntypedStorage:
        self.fetch()
        self._arrive()
        assert self._storage is not None, "fetched above"
        return self._storage

    def _arrive(self) -> None:
        copies, self._copies = self._copies, ()
        for copy in copies:
            copy.result()

    def __del__(self) -> None:
        for copy in self._copies:
            copy.exception()  # what went wrong no longer matters; that it is over does
        self._tier.free(self._region)


class _View:
    """A saved tensor, as a view of a storage that is away."""

    def __init__(self, tensor: Tensor, saved: _Saved) -> None:
        self._saved, self._dtype = saved, tensor.dtype
        self._place = (tensor.storage_offset(), tensor.shape, tensor.stride())

    def get(self) -> Tensor:
        storage = self._saved.get()
        return torch.empty(0, dtype=self._dtype, device=storage.device).set_(storage, *self._place)


class Activations:
    """Saved tensor hooks for a model's forward pass."""

    def __init__(self, mover: Mover, tiers: Mapping[str, Tier]) -> None:
        self._mover, self._tiers = mover, tiers
        self.row: LiveRow | None = None
        """The row that computes."""
        self._engine: Engine | None = None
        self._hooks: Any = None
        self._saved: defaultdict[LiveRow, weakref.WeakSet[_Saved]] = defaultdict(weakref.WeakSet)
        self._known: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[_Saved]]] = {}

    def enter(self, engine: Engine) -> None:
        """From here on autograd saves through this object."""
        self._engine = engine
        if self._hooks is None and torch.is_grad_enabled():
            self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
            self._hooks.__enter__()

    def leave(self) -> None:
        hooks, self._hooks = self._hooks, None
        self._known.clear()
        if hooks is not None:
            hooks.__exit__(None, None, None)

    def _pack(self, tensor: Tensor) -> Any:
        assert self._engine is not None, "hooks are entered by an engine"
        live = self._engine.touched(tensor)
        if live is not None:
            return _Weight(tensor, live)
        row = self.row or self._engine.coming_row()  # what is recomputed saves its input before its module is called
        if row is None or row.places.activations == "device" or (tensor.is_leaf and tensor.requires_grad):
            return tensor
        if type(tensor) is not Tensor or tensor.untyped_storage().nbytes() < SMALLEST:
            return tensor
        return _View(tensor, self._sent(tensor, row))

    def _sent(self, tensor: Tensor, row: LiveRow) -> _Saved:
        """The tensor's storage, sent away once for all views of it that are saved."""
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor._version)
        if key in self._known:
            alive, known = self._known[key]
            saved = known()
            if saved is not None and not alive.expired():
                return saved
        saved = _Saved(storage, self._tiers[row.places.activations], self._mover)
        self._saved[row].add(saved)
        self._known[key] = StorageWeakRef(storage), weakref.ref(saved)  # the reference keeps the number from being used again
        self._mover.settle(self._mover.in_flight_bytes)
        return saved

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _Weight):
            assert self._engine is not None, "hooks are entered by an engine"
            self._engine.need(packed.live)
            return packed.tensor
        tensor: Tensor = packed.get() if isinstance(packed, _View) else packed
        return tensor

    def fetch(self, row: LiveRow) -> None:
        """Begin to bring the activations of a row."""
        for saved in list(self._saved.get(row, ())):
            saved.fetch()
