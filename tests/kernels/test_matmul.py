"""Products by loops of our own: any shape, any layout, exact but for one rounding."""

from __future__ import annotations

import itertools

import pytest
import torch

from matrices import FORMAT, OURS, PRODUCTS, laid, near, normal
from sartor.kernels import matmul, native
from sartor.kernels.matmul import multiply, product

pytestmark = OURS


@pytest.fixture(params=["as it is", "pairs"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one; this one without its tiles."""
    if request.param == "pairs":
        if not matmul.has_tiles():
            pytest.skip("this processor has no tiles")
        flags = "-fno-exceptions", "-ffp-contract=fast", "-mno-amx-tile"
        loaded = native.compiled("pairs", native._PRODUCTS, native._TILES, flags=flags)
        monkeypatch.setattr(matmul, "products_library", lambda: loaded)
        monkeypatch.setattr(matmul, "_worth", loaded.matmul_worth)
        assert matmul.multiplies()
        assert not matmul.has_tiles()


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize(("m", "n", "k"), PRODUCTS)
@pytest.mark.parametrize("turned", list(itertools.product((False, True), repeat=3)))
def test_it_is_the_product(m: int, n: int, k: int, turned: tuple[bool, bool, bool]) -> None:
    torch.manual_seed(0)
    a, b, c = laid(m, k, turned[0]), laid(k, n, turned[1]), laid(m, n, turned[2])
    assert near(multiply(a, b, c), a.double() @ b.double())
    more, bias = (normal(m, 15), laid(15, n, turned[1])), normal(n)
    exact = (a.double() @ b.double() + more[0].double() @ more[1].double()) * 0.5 + bias.double()
    multiply(a, b, c, more=more, bias_N=bias, scale=0.5)
    assert near(c, exact)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize(("m", "n", "k"), [(5, 20, 30), (64, 96, 64), (100, 200, 96), (49, 130, 4103)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_product_may_be_added_to_what_is_there(m: int, n: int, k: int, turned: bool) -> None:
    torch.manual_seed(0)
    a, b, c, more, bias = normal(m, k), normal(k, n), laid(m, n, turned), (normal(m, 15), normal(15, n)), normal(n)
    exact = c.double() + 0.5 * (a.double() @ b.double() + more[0].double() @ more[1].double()) + bias.double()
    assert multiply(a, b, c, more=more, bias_N=bias, scale=0.5, adds=True) is c
    assert near(c, exact)


def test_the_number_of_threads_changes_nothing_and_neighbours_are_left_alone() -> None:
    torch.manual_seed(0)
    a, b, threads = normal(130, 70), normal(70, 90), torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        room = torch.zeros(132, 96, dtype=FORMAT)
        multiply(a, b, room[1:131, :90])
        assert not any(part.any() for part in (room[0], room[131], room[:, 90:]))
        found.append(room)
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_nothing_to_sum_up_and_nothing_to_compute() -> None:
    bias = normal(5)
    assert multiply(normal(0, 4), normal(4, 5)).shape == (0, 5)
    result = torch.empty(3, 5, dtype=torch.float64)
    product(torch.ones(3, 2).double(), torch.ones(2, 5).double(), result, bias.double())  # of another format: PyTorch's
    torch.testing.assert_close(result, 2 + bias.double().expand(3, 5))
    product(torch.ones(3, 2).double(), torch.ones(2, 5).double(), result, adds=True)
    torch.testing.assert_close(result, 4 + bias.double().expand(3, 5))
