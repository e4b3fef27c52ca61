"""Main memory that an accelerator reads and writes by itself: page-locked, and exactly as much as is asked for.

PyTorch's own page-locked memory (`pin_memory=True`) comes in powers of two, and is kept: up to half of it may be wasted. Here
pages are mapped and then locked in place (`cudaHostRegister`), which CUDA and ROCm have.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import defaultdict

import torch
from torch import Tensor

from sartor.placement.tiers import HostTier, Region

_PORTABLE = 1
"""cudaHostRegisterPortable: locked for every context of the process."""


class PinnedTier(HostTier):
    """Main memory below an accelerator. What is freed stays locked and is used again for what has the same size or a little less;
    where that is not so, it is unlocked before more is locked."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._holes: defaultdict[int, list[int]] = defaultdict(list)
        self.cost = ""
        """What is lost where memory could not be locked as it should be; nothing where all is well."""

    def allocate(self, size: int) -> Region:
        with self._lock:
            fitting = [taken for taken, keys in self._holes.items() if keys and size <= taken <= size + size // 8]
            if not fitting:
                return super().allocate(size)
            self._use(size)
            return Region(self._holes[min(fitting)].pop(), size)

    def free(self, region: Region) -> None:
        with self._lock:
            self._holes[self._slabs[region.offset].nbytes].append(region.offset)
            self._use(-region.size)

    def _make(self, size: int) -> Tensor:
        if sum(taken * len(keys) for taken, keys in self._holes.items()) >= size:
            self._close_holes()
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        if self._device.type != "cuda":
            self.cost = (
                f"memory is locked by PyTorch's {self._device.type} allocator, which may round each tensor up to twice its size"
            )
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        pages = mmap.mmap(-1, size)
        with contextlib.suppress(OSError, AttributeError):  # large pages are locked sooner, where the system has them
            pages.madvise(mmap.MADV_HUGEPAGE)
        slab = torch.frombuffer(pages, dtype=torch.uint8)
        if not self._page_lock(slab):
            self.cost = (
                "the driver did not lock main memory (cudaHostRegister): copies go through the driver's own buffers, at a "
                "fraction of the link's rate, and nothing computes meanwhile"
            )
        return slab

    def _page_lock(self, slab: Tensor) -> bool:
        if int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.nbytes, _PORTABLE)) == 0:
            return True
        with contextlib.suppress(RuntimeError):  # the error stays behind, and would be taken for that of the next operator
            torch.ones(1, device=self._device)
        return False

    def _page_unlock(self, slab: Tensor) -> None:
        if self._device.type == "cuda" and slab.nbytes and slab.is_pinned():
            torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())

    def _close_holes(self) -> None:
        torch.accelerator.synchronize(self._device)  # copies of what was freed may not be over
        for keys in self._holes.values():
            for key in keys:
                self._page_unlock(self._slabs.pop(key))
        self._holes.clear()

    def close(self) -> None:
        torch.accelerator.synchronize(self._device)
        for slab in self._slabs.values():
            self._page_unlock(slab)
        super().close()
        self._holes.clear()
