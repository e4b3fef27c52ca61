"""The CPU's kernels beside PyTorch's operators: loss with head, AdamW with clipping. `python benchmarks/cpu_kernels.py`.

Both sides alternate in one process on one thread, and CPU time of that thread is counted: other processes disturb it less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common import save
from sartor.kernels.adam import MasterAdamW, gradient_norm
from sartor.kernels.loss import linear_cross_entropy
from sartor.kernels.native import missing

REPEATS = 3
PARAMETERS = 32_000_000


def seconds(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The least CPU time of every way."""
    least = dict.fromkeys(ways, float("inf"))
    for number in range(REPEATS + 1):
        for name, run in ways.items():
            start = time.thread_time()
            run()
            if number:
                least[name] = min(least[name], time.thread_time() - start)
    return least


def loss(rows: int, width: int, vocabulary: int, dtype: torch.dtype, *, frozen: bool) -> dict[str, float]:
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) * 0.02).to(dtype).requires_grad_(not frozen)
    targets = torch.randint(0, vocabulary, (rows,))

    def pytorch() -> None:
        hidden.grad = weight.grad = None
        (F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum") / rows).backward()

    def sartor() -> None:
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, targets, factor=1 / rows).backward()

    return seconds({"pytorch": pytorch, "sartor": sartor})


def adamw() -> dict[str, float]:
    """Clipping and update of one step: PyTorch's in float32, fused, and that of masters in two halves."""
    plain, halves = nn.Parameter(torch.randn(PARAMETERS)), nn.Parameter(torch.randn(PARAMETERS).bfloat16())
    plain.grad, halves.grad = torch.randn(PARAMETERS), torch.randn(PARAMETERS).bfloat16()
    theirs, ours = torch.optim.AdamW([plain], fused=True), MasterAdamW([halves])

    def pytorch() -> None:
        torch.nn.utils.clip_grad_norm_([plain], 1.0)
        theirs.step()

    def sartor() -> None:
        assert halves.grad is not None
        ours.scale = (1.0 / (gradient_norm([halves.grad]) + 1e-6)).clamp(max=1.0)
        ours.step()

    return {name: PARAMETERS / value / 1e9 for name, value in seconds({"pytorch": pytorch, "sartor": sartor}).items()}


def main() -> None:
    torch.set_num_threads(1)
    assert not missing(), missing()
    results: list[dict[str, Any]] = []
    for rows, width, vocabulary, dtype in (
        (512, 768, 32000, torch.bfloat16),
        (1024, 768, 50257, torch.bfloat16),
        (256, 768, 32000, torch.float32),
    ):
        for frozen in (True, False):
            figures = loss(rows, width, vocabulary, dtype, frozen=frozen)
            shape = {"rows": rows, "width": width, "vocabulary": vocabulary, "dtype": str(dtype)[6:], "head_frozen": frozen}
            results.append({"what": "head and loss, forward and backward, seconds", **shape, **figures})
    results.append({"what": "clipping and AdamW, 10^9 parameters a second", **adamw()})
    for result in results:
        print(*(f"{key}={value:.3f}" if isinstance(value, float) else f"{key}={value}" for key, value in result.items()))
    print(save("cpu-kernels", results, note="one thread, its CPU time, the least of three; other work on the machine"))


if __name__ == "__main__":
    main()
