"""Matrices of bfloat16 numbers as products meet them, and what a product of them has to be."""

from __future__ import annotations

import torch

ROUNDING = 2**-8


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def laid(rows: int, columns: int, turned: bool = False, *, gap: int = 0) -> torch.Tensor:
    """By rows, or `turned`: by columns; with so many numbers between one and the next that are not the matrix's."""
    return laid(columns, rows, gap=gap).t() if turned else normal(rows, columns + gap)[:, :columns]


def near(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Rounded once: within half a unit in the last place, and what summing in float32 leaves."""
    error = (found.double() - exact).abs()
    return bool((error <= ROUNDING * exact.abs() + 1e-5 * exact.abs().max()).all())
