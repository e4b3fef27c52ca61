"""Matrices as products of Sartor's own meet them on this machine, and what a product of them has to be."""

from __future__ import annotations

import pytest
import torch

from sartor.kernels.matmul import multiplies

FORMAT = torch.float32 if multiplies(torch.float32) and not multiplies() else torch.bfloat16
"""Of the numbers that this processor multiplies by compiled loops."""
OURS = pytest.mark.skipif(not multiplies(FORMAT), reason="no compiler, or a processor for which there are no products of our own")
ROUNDING = torch.finfo(FORMAT).eps / 2


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(FORMAT)


def laid(rows: int, columns: int, turned: bool = False, *, gap: int = 0) -> torch.Tensor:
    """By rows, or `turned`: by columns; with so many numbers between one and the next that are not the matrix's."""
    return laid(columns, rows, gap=gap).t() if turned else normal(rows, columns + gap)[:, :columns]


def near(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Rounded once: within half a unit in the last place, and what summing in float32 leaves."""
    error = (found.double() - exact).abs()
    return bool((error <= ROUNDING * exact.abs() + 1e-5 * exact.abs().max()).all())
