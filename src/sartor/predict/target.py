"""What a target device does otherwise than the CPU that the step is traced for: memory that no fake CPU tensor shows.

Only CUDA (and ROCm, which PyTorch drives through the same allocator) differs so far. Sources are beside each figure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sartor.machine import Device
from sartor.predict.cuda import attention_kernel, backward_scratch, cuda_rules, forward_scratch
from sartor.predict.ledger import Event, Ledger

MIB = 2**20

CUBLAS_WORKSPACE = {"before Hopper": 8_519_680, "from Hopper on": 32 * MIB}
"""Per cuBLAS handle and stream, allocated by its first matrix product and kept: `:4096:2:16:8` and `:4096:8`, in bytes
(PyTorch 2.13, aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize)."""

CUBLAS_HANDLES = 2
"""Handles belong to threads (the same file, DeviceThreadHandlePool): forward has one, and so has autograd in backward."""

CONTEXT = {"before Ampere": 150 * MIB, "from Ampere on": 450 * MIB}
"""What the driver takes for the process beside PyTorch's allocator: context and loaded kernels. 130–150 MiB were measured on a
T4; the figure for newer cards is a cautious guess that no measurement of ours backs yet. It enters the process's total, and the
capacity that the allocator is given, but neither allocated nor reserved."""

COMMUNICATOR = 300 * MIB
"""What NCCL takes for each communicator beside PyTorch's allocator: buffers of 4 MiB (NCCL_BUFFSIZE) for every channel and
protocol, in number by the links. A cautious guess that no measurement of ours backs yet; it enters the process's total only."""

_SOFTMAX_BACKWARD = torch.ops.aten._softmax_backward_data.default
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True, kw_only=True)
class Target:
    """The device whose memory is forecast."""

    kind: str
    sm: int | None = None

    @classmethod
    def of(cls, device: Device) -> Target:
        return cls(kind=device.kind, sm=device.sm)

    @property
    def capability(self) -> int:
        """CUDA's compute capability, 90 for 9.0; where there is none (ROCm), that of the cards most like it."""
        return self.sm or 80

    @property
    def workspace_bytes(self) -> int:
        """Memory that the matrix library takes from the allocator for good, all handles together."""
        if self.kind != "cuda":
            return 0
        return CUBLAS_HANDLES * CUBLAS_WORKSPACE["from Hopper on" if self.capability >= 90 else "before Hopper"]

    @property
    def context_bytes(self) -> int:
        """Memory that the driver takes beside the allocator."""
        if self.kind != "cuda":
            return 0
        return CONTEXT["from Ampere on" if self.capability >= 80 else "before Ampere"]

    def communicator_bytes(self, communicators: int) -> int:
        """Memory that so many communicators take beside the allocator."""
        return communicators * COMMUNICATOR if self.kind == "cuda" else 0

    def rules(self) -> contextlib.AbstractContextManager[None]:
        """The context in which a step on CPU tensors takes the target's way (`sartor.predict.cuda`)."""
        return cuda_rules(self.capability) if self.kind == "cuda" else contextlib.nullcontext()

    def transient_bytes(self, func: Any, args: Sequence[Any]) -> int:
        """Scratch memory that a kernel of the target takes while `func` runs, where the CPU's takes none.

        Which attention kernel runs depends on a mask and on dropout, too, but how much these take differs by rounding only.
        """
        if self.kind != "cuda":
            return 0
        if func is _SOFTMAX_BACKWARD:
            # `Tensor tmp = grad * output` (PyTorch 2.13, aten/src/ATen/native/cuda/SoftMax.cu, softmax_backward_cuda_out).
            gradient: torch.Tensor = args[0]
            return gradient.numel() * gradient.element_size()
        if func not in (_ATTENTION, _ATTENTION_BACKWARD):
            return 0
        query, key, value = args[:3] if func is _ATTENTION else args[1:4]
        kernel = attention_kernel(self.capability, query, key, value, masked=False, grouped=True)
        return forward_scratch(kernel, query, value) if func is _ATTENTION else backward_scratch(kernel, query, key, value)

    def with_workspace(self, ledger: Ledger, *, handles: int = CUBLAS_HANDLES) -> Sequence[Event]:
        """The ledger's events as the target's allocator sees them, the matrix library's workspaces among them."""
        if not self.workspace_bytes:
            return ledger.events
        first = next((place for place, event in enumerate(ledger.events) if event.phase != "build"), 0)
        size = self.workspace_bytes // CUBLAS_HANDLES
        workspaces = [Event(storage=-1 - handle, size_bytes=size, phase="build") for handle in range(handles)]
        return [*ledger.events[:first], *workspaces, *ledger.events[first:]]
