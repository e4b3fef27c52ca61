"""What of a placed model is in memory at once, beside a walk through its step."""

from __future__ import annotations

import random
from itertools import zip_longest

import pytest

from sartor.plan.placed import _Passes
from sartor.plan.table import KINDS, RowPlaces, Sizes, Table, uniform, within
from sartor.predict.ledger import Event, Ledger


def row_sizes(source: random.Random) -> list[Sizes]:
    count = source.randint(1, 6)
    return [
        Sizes(
            name=str(number),
            weights=source.randint(1, 9),
            gradients=source.choice([0, source.randint(1, 9)]),
            state=source.randint(0, 20),
        )
        for number in range(count)
    ]


def table_of(source: random.Random, sizes: list[Sizes]) -> Table:
    places = ("device", "disk")
    return Table(
        rows=tuple(
            RowPlaces(name=size.name, weights=source.choice(places), gradients=source.choice(places), state=source.choice(places))
            for size in sizes
        )
    )


@pytest.mark.parametrize("seed", range(40))
def test_an_update_holds_two_rows_and_the_gradients_that_are_left(seed: int) -> None:
    """Rows of which nothing moves are updated first; then each of the others, while the next one comes."""
    source = random.Random(seed)
    sizes = row_sizes(source)
    table = table_of(source, sizes)
    there = {(size.name, kind): getattr(table.row(size.name), kind) == "device" for size in sizes for kind in KINDS}
    live = {(size.name, kind): getattr(size, kind) for size in sizes for kind in KINDS if there[size.name, kind]}
    moving = [size for size in sizes if not table.row(size.name).stays]

    def bring(size: Sizes) -> None:
        live.update({(size.name, kind): getattr(size, kind) for kind in KINDS})

    most = sum(live.values())
    if moving:
        bring(moving[0])
        most = max(most, sum(live.values()))
    for size in sizes:
        if size not in moving:
            live.pop((size.name, "gradients"), None)
    for size, follower in zip_longest(moving, moving[1:]):
        most = max(most, sum(live.values()))
        live.pop((size.name, "gradients"), None)
        gone = 0 if there[size.name, "gradients"] else size.gradients  # what is written is there until it has been
        if follower is not None:
            bring(follower)
        most = max(most, sum(live.values()) + gone)
        for kind in ("weights", "state"):
            if not there[size.name, kind]:
                live.pop((size.name, kind), None)
    assert table.update_peak(sizes, table.update_room(sizes)) == most


def test_what_passes_hold_is_not_the_sum_of_two_peaks() -> None:
    """Activations are most when there are no gradients; where some live elsewhere, those are the ones that come first."""
    kinds = {1: "weights", 4: "gradients", 5: "gradients"}
    sizes = [(1, 10), (2, 60), (3, 5), (3, -5), (4, 30), (2, -60), (5, 20), (4, -30), (5, -20)]
    phases = ["build", *["step 2: forward"] * 2, *["step 2: backward"] * 4, *["step 2: update"] * 2]
    events = [
        Event(storage=storage, size_bytes=size, phase=phase, module="")
        for (storage, size), phase in zip(sizes, phases, strict=True)
    ]
    passes = _Passes.of(Ledger(events=events, kinds=kinds), shared=0)
    assert sum(passes.most(0)) == 90  # the activation beside the first gradient
    assert passes.most(30) == (65, 0)  # that of the forward pass
    assert passes.most(10) == (60, 20)


def test_a_budget_for_gradients_as_they_come() -> None:
    sizes = [Sizes(name=str(number), weights=10, gradients=10, state=20) for number in range(4)]
    lasting = 4 * 30

    def passes(away: int) -> int:  # gradients are complete when activations have gone
        return max(100, 40 - away)

    assert within(sizes, lasting + 100, "disk", passes=passes, released=True) == uniform(sizes, "device")
    fewer = within(sizes, lasting + 99, "disk", passes=passes, released=True)
    assert fewer is not None
    assert fewer.row("3").state == "disk"
    assert fewer.row("0").stays
