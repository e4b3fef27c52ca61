"""What a target device does otherwise than the CPU that the step is traced for: memory that no fake CPU tensor shows.

Only CUDA (and ROCm, which PyTorch drives through the same allocator) differs so far. Sources are beside each figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sartor.machine import Device
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


@dataclass(frozen=True, kw_only=True)
class Target:
    """The device whose memory is forecast."""

    kind: str
    sm: int | None = None

    @classmethod
    def of(cls, device: Device) -> Target:
        return cls(kind=device.kind, sm=device.sm)

    @property
    def workspace_bytes(self) -> int:
        """Memory that the matrix library takes from the allocator for good, all handles together."""
        if self.kind != "cuda":
            return 0
        return CUBLAS_HANDLES * CUBLAS_WORKSPACE["from Hopper on" if (self.sm or 80) >= 90 else "before Hopper"]

    @property
    def context_bytes(self) -> int:
        """Memory that the driver takes beside the allocator."""
        if self.kind != "cuda":
            return 0
        return CONTEXT["from Ampere on" if (self.sm or 80) >= 80 else "before Ampere"]

    def communicator_bytes(self, communicators: int) -> int:
        """Memory that so many communicators take beside the allocator."""
        return communicators * COMMUNICATOR if self.kind == "cuda" else 0

    def transient_bytes(self, func: Any, args: Sequence[Any]) -> int:
        """Scratch memory that a kernel of the target takes while `func` runs, where the CPU's takes none.

        Flash attention needs compute capability 8.0; what older cards use instead (memory-efficient) is not modelled.
        """
        flash = self.kind == "cuda" and (self.sm or 80) >= 80
        if flash and func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            return _flash_backward_scratch(query=args[1], key=args[2])
        if self.kind == "cuda" and func is torch.ops.aten._softmax_backward_data.default:
            # `Tensor tmp = grad * output` (PyTorch 2.13, aten/src/ATen/native/cuda/SoftMax.cu, softmax_backward_cuda_out).
            gradient: torch.Tensor = args[0]
            return gradient.numel() * gradient.element_size()
        return 0

    def with_workspace(self, ledger: Ledger, *, handles: int = CUBLAS_HANDLES) -> Sequence[Event]:
        """The ledger's events as the target's allocator sees them, the matrix library's workspaces among them."""
        if not self.workspace_bytes:
            return ledger.events
        first = next((place for place, event in enumerate(ledger.events) if event.phase != "build"), 0)
        size = self.workspace_bytes // CUBLAS_HANDLES
        workspaces = [Event(storage=-1 - handle, size_bytes=size, phase="build") for handle in range(handles)]
        return [*ledger.events[:first], *workspaces, *ledger.events[first:]]


def _flash_backward_scratch(query: torch.Tensor, key: torch.Tensor) -> int:
    """FlashAttention-2's backward (Dao 2023, arXiv 2307.08691; PyTorch's flash_attn/flash_api.cpp, mha_bwd).

    dQ is accumulated in float32 and a row sum is kept, rounded to 128 rows and 32 columns; grouped keys and values get a gradient
    per query head first.
    """
    batch, heads, length, width = query.shape
    rows, columns = -(-length // 128) * 128, -(-width // 32) * 32
    accumulator = 4 * batch * heads * rows * columns + 4 * batch * heads * rows
    expanded = 2 * batch * heads * key.shape[2] * width * key.element_size() if key.shape[1] != heads else 0
    return accumulator + expanded
