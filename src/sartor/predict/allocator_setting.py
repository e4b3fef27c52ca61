"""The one setting of PyTorch's CUDA allocator that Sartor chooses: expandable segments.

They let blocks grow in place, so that what is reserved hardly depends on the order of lengths (`sartor.predict.drift`). PyTorch
leaves them off; runs of ours turn them on, unless the job or the user's PYTORCH_ALLOC_CONF says otherwise.
"""

from __future__ import annotations

import os
import re
from typing import Literal

import torch

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_EXPANDABLE = re.compile(r"expandable_segments\s*:\s*(\w+)")


def expandable_segments(wanted: Literal["auto"] | bool, device_kind: str, *, here: bool) -> bool:
    """Whether a run has them. `here`: it is planned for this machine, so the user's environment counts."""
    if device_kind != "cuda":
        return False
    if wanted != "auto":
        return wanted
    said = _EXPANDABLE.findall(_environment()) if here else []
    return said[-1].lower() == "true" if said else not (here and _other_backend())


def set_expandable_segments(enabled: bool) -> None:
    """Tell PyTorch's allocator, also where CUDA is initialised already. What else the user has set stays."""
    if _other_backend():
        return
    rest = [part for part in _environment().split(",") if part.strip() and not _EXPANDABLE.search(part)]
    torch._C._accelerator_setAllocatorSettings(",".join([*rest, f"expandable_segments:{enabled}"]))


def _environment() -> str:
    return next((text for name in _VARIABLES if (text := os.environ.get(name, ""))), "")


def _other_backend() -> bool:
    """Whether the user has chosen an allocator that is not PyTorch's own."""
    return "backend:" in _environment() and "backend:native" not in _environment()
