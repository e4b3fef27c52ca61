"""Products with one thin side: what general ones give, whichever way matrices lie, and whatever the number of threads."""

import pytest
import torch

from matrices import laid, near
from sartor.kernels.matmul import has_tiles, multiplies
from sartor.kernels.thin import gradient, narrow, narrow_and_gradient

pytestmark = pytest.mark.skipif(not multiplies(), reason="this processor has no products of bfloat16 numbers")

SIZES = "16x16x16 15x40x4 17x62x3 33x40x5 79x65x33 81x64x16 129x100x40 257x34x17 1000x776x64"
"""Rows, columns and ranks."""


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", SIZES.split())
def test_both_sides_of_a_pass_are_products(size: str, turned: bool) -> None:
    rows, columns, rank = map(int, size.split("x"))
    torch.manual_seed(rows)
    z, w = laid(rows, columns, gap=5), laid(columns, rank, turned)
    given, low, to = laid(rows, rank, gap=3), laid(rows, rank, gap=7), laid(rank, columns, turned)
    narrow_and_gradient(z, w, low, given, to, scale=0.5)
    assert near(low, 0.5 * z.double() @ w.double())
    assert near(to, given.double().t() @ z.double())

    alone, to_alone = torch.empty_like(low), laid(rank, columns, turned)
    narrow(z, w, alone, scale=0.5)
    gradient(given, z, to_alone)
    assert torch.equal(alone, low)
    assert torch.equal(to_alone, to)


def test_what_lies_beside_the_matrices_is_not_touched() -> None:
    room, to_room = torch.full((70, 40), 7.0, dtype=torch.bfloat16), torch.full((30, 90), 7.0, dtype=torch.bfloat16)
    low, to = room[3:67, 5:25], to_room[4:24, 2:80]
    z, given = laid(64, 78, gap=2), laid(64, 20)
    narrow_and_gradient(z, laid(78, 20), low, given, to)
    low.fill_(7.0), to.fill_(7.0)
    assert (room == 7).all()
    assert (to_room == 7).all()


def test_what_is_not_a_number_stays_in_its_row_and_columns() -> None:
    z, given = laid(100, 96), laid(100, 16)
    z[40, 50] = float("nan")
    low, to = laid(100, 16), laid(16, 96)
    narrow_and_gradient(z, laid(96, 16), low, given, to)
    assert low.isnan().any(1).nonzero().flatten().tolist() == [40]
    assert 50 in to.isnan().any(0).nonzero().flatten().tolist()


@pytest.mark.skipif(not has_tiles(), reason="this processor has no tiles")
def test_any_number_of_threads_gives_the_same() -> None:
    z, w, given = laid(900, 200), laid(200, 16), laid(900, 16)
    found = []
    usual = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            low, to = laid(900, 16), laid(16, 200)
            narrow_and_gradient(z, w, low, given, to)
            found.append((low, to))
    finally:
        torch.set_num_threads(usual)
    assert all(torch.equal(one, other) for more in found[1:] for one, other in zip(found[0], more, strict=True))
