"""Matrices as products of Sartor's own meet them on this machine, and what a product of them has to be."""

from __future__ import annotations

import pytest
import torch

from sartor.kernels.matmul import multiplies

FORMAT = torch.float32 if multiplies(torch.float32) and not multiplies() else torch.bfloat16
"""Of the numbers that this processor multiplies by compiled loops."""
OURS = pytest.mark.skipif(not multiplies(FORMAT), reason="no compiler, or a processor for which there are no products of our own")
ROUNDING = torch.finfo(FORMAT).eps / 2

PRODUCTS = [
    (1, 16, 2),
    (5, 20, 30),
    (100, 200, 96),
    (37, 34, 51),
    (7, 3, 5),
    (3, 301, 770),  # few rows, which a weight meets as it lies
    (15, 7, 1030),
    (49, 130, 64),
    (16, 18, 4103),  # in several parts
    (1100, 80, 33),
    (3, 530, 9),
    (50, 200, 1024),  # rows so far apart that they meet in a cache: other strips of tiles
    (35, 1570, 4096),  # and wide panels, or more columns than are laid out together
    (20, 40, 2048),
]
"""M, N and K of products that go every way through the loops."""


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(FORMAT)


def laid(rows: int, columns: int, turned: bool = False, *, gap: int = 0) -> torch.Tensor:
    """By rows, or `turned`: by columns; with so many numbers between one and the next that are not the matrix's."""
    return laid(columns, rows, gap=gap).t() if turned else normal(rows, columns + gap)[:, :columns]


def near(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Rounded once: within half a unit in the last place, and what summing in float32 leaves."""
    error = (found.double() - exact).abs()
    return bool((error <= ROUNDING * exact.abs() + 1e-5 * exact.abs().max()).all())
