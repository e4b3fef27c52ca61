"""The picture of a step: no peak is lost, what lies between points is known, and every moment has a name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sartor
from sartor.predict import Ledger
from sartor.predict.ledger import KINDS, Event
from sartor.predict.timeline import Timeline, clock, make_timeline


def ledger_of(sizes: list[int], lives: list[int], kinds: list[int], *, module: str = "") -> Ledger:
    """Storages that come one after another, each for so many further events, in two steps; half a weight stays."""
    ledger = Ledger()
    ledger.events.append(Event(storage=-1, size_bytes=1000, phase="build"))
    ledger.kinds[-1] = "weights"
    for step in (1, 2):
        due: list[tuple[int, int]] = []
        for number, (size, life, kind) in enumerate(zip(sizes, lives, kinds, strict=True)):
            storage = number + step * len(sizes)
            phase = f"step {step}: {'forward and backward' if number < len(sizes) // 2 else 'update'}"
            ledger.events.append(Event(storage=storage, size_bytes=size, phase=phase, module=module))
            ledger.kinds[storage] = KINDS[kind]
            due.append((number + life, storage))
            for _, dead in [entry for entry in due if entry[0] <= number]:
                size_of = sizes[dead - step * len(sizes)]
                ledger.events.append(Event(storage=dead, size_bytes=-size_of, phase=phase, module=module))
            due = [entry for entry in due if entry[0] > number]
        for _, dead in due:
            size_of = sizes[dead - step * len(sizes)]
            ledger.events.append(Event(storage=dead, size_bytes=-size_of, phase=f"step {step}: update"))
    return ledger


def exact(ledger: Ledger) -> np.ndarray:
    """Bytes by place and kind of the second step, counted one by one."""
    live = dict.fromkeys(KINDS, 0)
    rows = []
    for event in ledger.events:
        live[ledger.kinds[event.storage]] += event.size_bytes
        if event.phase.startswith("step 2"):
            rows.append(list(live.values()))
    return np.array(rows)


stories = st.integers(4, 120).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 10**6), min_size=n, max_size=n),
        st.lists(st.integers(0, 30), min_size=n, max_size=n),
        st.lists(st.integers(1, 3), min_size=n, max_size=n),
    )
)


@given(stories, st.integers(5, 60))
def test_few_points_keep_the_peak_and_say_how_far_they_are_off(story: tuple[list[int], list[int], list[int]], most: int) -> None:
    ledger = ledger_of(*story)
    timeline = make_timeline(ledger, most_points=most)
    assert timeline is not None
    assert len(timeline.moments) == len(timeline.live_bytes) <= most
    assert timeline.peak_bytes == ledger.peak().total_bytes
    assert dict(zip(timeline.kinds, timeline.live_bytes[timeline.peak], strict=True)) == ledger.peak().by_kind
    rows = exact(ledger)
    moments = clock([event for event in ledger.events if event.phase.startswith("step 2")])[1:]
    assert (np.diff(moments) > 0).all()
    assert moments[-1] == timeline.moments[-1] == 1
    drawn = np.stack([np.interp(moments, timeline.moments, column) for column in np.array(timeline.live_bytes).T], 1)
    assert np.abs(drawn.cumsum(axis=1) - rows.cumsum(axis=1)).max() <= timeline.off_by_bytes + 1e-3
    if most > len(rows):
        assert timeline.off_by_bytes == 0


@given(stories, st.integers(1, 70))
def test_columns_hold_the_peak(story: tuple[list[int], list[int], list[int]], count: int) -> None:
    timeline = make_timeline(ledger_of(*story), most_points=20)
    assert timeline is not None
    columns = timeline.columns(count)
    assert len(columns) == count
    assert max(sum(column) for column in columns) == pytest.approx(timeline.peak_bytes)


def test_the_step_with_the_peak_is_shown() -> None:
    ledger = ledger_of([10, 20, 30, 5], [1, 1, 1, 1], [3, 3, 3, 3])
    first = [event._replace(size_bytes=event.size_bytes * (7 if "step 1" in event.phase else 1)) for event in ledger.events]
    timeline = make_timeline(Ledger(events=first, kinds=ledger.kinds))
    assert timeline is not None
    assert timeline.peak_bytes == Ledger(events=first, kinds=ledger.kinds).peak().total_bytes > 1200
    assert make_timeline(Ledger()) is None
    assert make_timeline(Ledger(events=[Event(storage=0, size_bytes=5, phase="build")])) is None


def test_kinds_of_others_are_drawn_too() -> None:
    ledger = ledger_of([10, 20], [1, 1], [3, 3])
    ledger.kinds[2] = "cache"
    timeline = make_timeline(ledger)
    assert timeline is not None
    assert timeline.kinds == (*KINDS, "cache")


def planned(tree: dict[str, Any], **changes: Any) -> Timeline:
    timeline = sartor.plan({**tree, "data": {"synthetic": {"length": 64, "examples": 16}}, **changes}).forecast.timeline
    assert timeline is not None
    return timeline


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("method", ["full", "lora", "prompt"])
def test_forward_and_backward_of_every_micro_batch_are_told_apart(job_tree: dict[str, Any], method: str, recompute: str) -> None:
    job_tree |= {"method": method, "strategy": {"micro_batch": 4, "recompute": recompute}}
    timeline = planned(job_tree)
    names = [section.name for section in timeline.sections]
    assert names[:4] == ["forward", "loss and backward"] * 2
    assert names[-1] == "update"
    assert [section.first for section in timeline.sections] == [0, *(section.end for section in timeline.sections[:-1])]
    assert timeline.sections[-1].end == 1
    assert timeline.peak_section in names


def test_a_backward_peak_names_the_module_whose_memory_it_needs(job_tree: dict[str, Any]) -> None:
    """Many layers, little in the loss: the peak lies where backward begins, in the last modules."""
    timeline = planned(job_tree, method="lora", strategy={"micro_batch": 8, "recompute": "none"})
    assert timeline.peak_section == "loss and backward"
    assert timeline.peak_module in ("lm_head", "model.norm") or timeline.peak_module.startswith("model.layers.*")
    assert timeline.peak_kind == "activations"


def test_an_accelerator_brings_what_its_allocator_holds(job_tree: dict[str, Any]) -> None:
    job_tree |= {"machine": "L40S-48GB", "model": job_tree["model"] + "/config.json"}
    timeline = planned(job_tree)
    assert timeline.reserved
    moments = [moment for moment, _ in timeline.reserved]
    assert moments == sorted(moments)
    assert 0 <= moments[0] < moments[-1] <= 1
    assert max(size for _, size in timeline.reserved) >= timeline.peak_bytes
