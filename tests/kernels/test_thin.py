"""Products with one thin side: what general ones give, whichever way matrices lie, and whatever the number of threads."""

import pytest
import torch

from sartor.kernels.matmul import has_tiles, multiplies
from sartor.kernels.thin import gradient, narrow, narrow_and_gradient

pytestmark = pytest.mark.skipif(not multiplies(), reason="this processor has no products of bfloat16 numbers")

SIZES = [
    (16, 16, 16),
    (15, 40, 4),
    (17, 62, 3),
    (33, 40, 5),
    (79, 65, 33),
    (81, 64, 16),
    (129, 100, 40),
    (257, 34, 17),
    (1000, 776, 64),
]


def _matrix(rows: int, columns: int, *, gap: int = 0, turned: bool = False) -> torch.Tensor:
    if turned:
        return _matrix(columns, rows, gap=gap).t()
    return torch.randn(rows, columns + gap).to(torch.bfloat16)[:, :columns]


def _near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), wanted, rtol=2**-7, atol=2**-7 * float(wanted.abs().max()))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("rows", "columns", "rank"), SIZES)
def test_both_sides_of_a_pass_are_products(rows: int, columns: int, rank: int, turned: bool) -> None:
    torch.manual_seed(rows)
    z, w = _matrix(rows, columns, gap=5), _matrix(columns, rank, turned=turned)
    given, low, to = _matrix(rows, rank, gap=3), _matrix(rows, rank, gap=7), _matrix(rank, columns, turned=turned)
    narrow_and_gradient(z, w, low, given, to, scale=0.5)
    _near(low, 0.5 * z.float() @ w.float())
    _near(to, given.float().t() @ z.float())

    alone, to_alone = torch.empty_like(low), _matrix(rank, columns, turned=turned)
    narrow(z, w, alone, scale=0.5)
    gradient(given, z, to_alone)
    assert torch.equal(alone, low)
    assert torch.equal(to_alone, to)


def test_what_lies_beside_the_matrices_is_not_touched() -> None:
    room, to_room = torch.full((70, 40), 7.0, dtype=torch.bfloat16), torch.full((30, 90), 7.0, dtype=torch.bfloat16)
    low, to = room[3:67, 5:25], to_room[4:24, 2:80]
    z, given = _matrix(64, 78, gap=2), _matrix(64, 20)
    narrow_and_gradient(z, _matrix(78, 20), low, given, to)
    low.fill_(7.0), to.fill_(7.0)
    assert (room == 7).all()
    assert (to_room == 7).all()


def test_what_is_not_a_number_stays_in_its_row_and_columns() -> None:
    z, given = _matrix(100, 96), _matrix(100, 16)
    z[40, 50] = float("nan")
    low, to = _matrix(100, 16), _matrix(16, 96)
    narrow_and_gradient(z, _matrix(96, 16), low, given, to)
    assert low.isnan().any(1).nonzero().flatten().tolist() == [40]
    assert 50 in to.isnan().any(0).nonzero().flatten().tolist()


@pytest.mark.skipif(not has_tiles(), reason="this processor has no tiles")
def test_any_number_of_threads_gives_the_same() -> None:
    z, w, given = _matrix(900, 200), _matrix(200, 16), _matrix(900, 16)
    found = []
    usual = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            low, to = _matrix(900, 16), _matrix(16, 200)
            narrow_and_gradient(z, w, low, given, to)
            found.append((low, to))
    finally:
        torch.set_num_threads(usual)
    assert all(torch.equal(one, other) for more in found[1:] for one, other in zip(found[0], more, strict=True))
