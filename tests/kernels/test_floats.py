"""Products in float32 by loops of our own: any shape, any layout; on every processor with AVX2, also where they are not used."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from matrices import PRODUCTS
from sartor.kernels import matmul, native
from sartor.kernels.matmul import multiply
from sartor.machine import probe

pytestmark = pytest.mark.skipif(
    native.products_library() is None or "avx2" not in probe().instruction_sets,
    reason="no compiler, or a processor without AVX2",
)


@pytest.fixture(autouse=True)
def _as_on_such_a_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    loaded = native.products_library()
    if "avx512f" in probe().instruction_sets:
        flags = "-fno-exceptions", "-ffp-contract=fast", "-mno-avx512f"
        loaded = native.compiled("floats", native._PRODUCTS, native._TILES, flags=flags)
    assert loaded is not None
    monkeypatch.setattr(matmul, "products_library", lambda: loaded)
    monkeypatch.setattr(matmul, "_worth_in_floats", lambda: 1)
    matmul._Blocks._of_floats.cache_clear()
    yield
    matmul._Blocks._of_floats.cache_clear()


def laid(rows: int, columns: int, turned: bool, *, gap: int = 3) -> torch.Tensor:
    whole = torch.randn(columns, rows + gap) if turned else torch.randn(rows, columns + gap)
    return whole[:, :rows].t() if turned else whole[:, :columns]


def near(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """What summing in float32 leaves."""
    return bool(((found.double() - exact).abs() <= 1e-6 * exact.abs() + 2e-6 * exact.abs().max()).all())


@pytest.mark.parametrize(("m", "n", "k"), PRODUCTS)
@pytest.mark.parametrize("turned", list(itertools.product((False, True), repeat=3)))
def test_it_is_the_product(m: int, n: int, k: int, turned: tuple[bool, bool, bool]) -> None:
    torch.manual_seed(0)
    a, b, c = laid(m, k, turned[0]), laid(k, n, turned[1]), laid(m, n, turned[2])
    product = a.double() @ b.double()
    assert near(multiply(a, b, c), product)
    more, bias = (torch.randn(m, 15), laid(15, n, turned[1])), torch.randn(n)
    multiply(a, b, c, bias_N=bias, scale=0.5)
    assert near(c, product * 0.5 + bias.double())
    multiply(a, b, c, bias_N=bias, scale=0.5, adds=True)
    assert near(c, product + 2 * bias.double())
    exact = (product + more[0].double() @ more[1].double()) * 0.5 + bias.double()
    multiply(a, b, c, more=more, bias_N=bias, scale=0.5)
    assert near(c, exact)
    multiply(a, b, c, more=more, bias_N=bias, scale=0.5, adds=True)
    assert near(c, 2 * exact)


@pytest.mark.parametrize("rows", [130, 20])
def test_the_number_of_threads_changes_nothing_and_neighbours_are_left_alone(rows: int) -> None:
    torch.manual_seed(0)
    a, b, threads = laid(rows, 970, rows < 64), torch.randn(970, 90), torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        room = torch.zeros(rows + 2, 96)
        multiply(a, b, room[1:-1, :90])
        assert not any(part.any() for part in (room[0], room[-1], room[:, 90:]))
        found.append(room)
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_what_is_not_a_number_stays_where_it_belongs() -> None:
    a, b = torch.ones(20, 30), torch.ones(30, 40)
    a[7, 3] = float("nan")
    found = multiply(a, b).isnan()
    assert found[7].all()
    assert not found[:7].any()
    assert not found[8:].any()
