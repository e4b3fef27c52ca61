"""The ledger of a step some of whose rows live elsewhere: byte by byte what a plain walk over the same events has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from sartor.data.pack import collate, fill_rows
from sartor.data.tokens import Sample, TokenSet
from sartor.job import from_mapping
from sartor.model import ModelSource, skeleton
from sartor.model.regions import reduce_depth
from sartor.model.rows import find_rows
from sartor.predict import KINDS
from sartor.predict.allocator import replay
from sartor.predict.offload import Away, PlacedTrace
from sartor.predict.rows import made_in_order, rows_of
from sartor.predict.target import Target
from sartor.predict.whole import trace_job
from sartor.step import Precision, make_trainable

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "intermediate_size": 80, "num_hidden_layers": 3, "tie_word_embeddings": False},
    "deep": {**COMMON, "intermediate_size": 80, "num_hidden_layers": 9, "tie_word_embeddings": True},
    "gemma3_text": {  # every second layer attends to everything: units of two blocks
        **COMMON, "intermediate_size": 80, "num_hidden_layers": 12, "num_key_value_heads": 2, "head_dim": 8,
        "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 6,
    },
}  # fmt: skip


def trace_of(name: str, *, recompute: bool = False, micro_batches: int = 2, method: str = "full") -> PlacedTrace:
    kind = "llama" if name == "deep" else name
    config = AutoConfig.for_model(kind, **MODELS[name])
    source = ModelSource(path=name, config=config, has_weights=False)
    job = from_mapping({"model": name, "data": "d", "method": method, "training": {"global_batch": micro_batches}})
    samples = TokenSet.from_samples([Sample(input_ids=np.arange(24), trained=np.ones(24, dtype=bool), source="here")])
    batch = collate(samples, fill_rows([0], samples.lengths, capacity=24, packing=False), pad_id=0, packing=False)
    precision = Precision.of("bf16-mixed")
    ledger = trace_job(
        job, source, [batch] * micro_batches, Target(kind="cuda", sm=80), precision=precision, recompute=recompute,
        attention=None, layers=True,
    )  # fmt: skip
    dtype = precision.load_dtype(adapter=method != "full")
    units = reduce_depth(skeleton(source, dtype=dtype), singles=True).blocks()
    model = make_trainable(skeleton(source, dtype=dtype), job, precision, recompute=recompute, meta=True)
    rows = find_rows(model)
    return PlacedTrace(ledger, rows_of(model, rows, units), made_in_order(model, rows))


def everywhere(trace: PlacedTrace, *kinds: str, **options: Any) -> Away:
    return Away(**dict.fromkeys(kinds, frozenset(range(len(trace.rows)))), **options)


def walked(trace: PlacedTrace, away: Away) -> int:
    """The peak, from what is there in each stretch: the plain way to say what `PlacedTrace` says with comings and goings."""
    weights = [sum(trace.ledger.events[trace._made[s]].size_bytes for s in owned.weights) for owned in trace.owned]
    kind_of = {s: ("weights", row) for row, owned in enumerate(trace.owned) for s in owned.weights}
    kind_of |= {s: ("state", row) for row, owned in enumerate(trace.owned) for s in owned.state}
    steps = {s: step for owned in trace.owned for step, storages in owned.gradients.items() for s in storages}
    kind_of |= {s: ("gradients", row) for row, owned in enumerate(trace.owned) for g in owned.gradients.values() for s in g}
    live: dict[int, tuple[int, int, int]] = {}
    there_then = [
        {(row, step) for row in away.gradients for step in (1, 2) if there(trace, place, row, step, away.ahead)}
        for place in range(len(trace.stretches))
    ]
    others = most = 0
    place = 0
    for number, event in enumerate(trace.ledger.events):
        while place + 1 < len(trace.stretches) and number >= trace.stretches[place].end:
            if trace.stretches[place + 1].start > number:
                break
            place += 1
        inside = trace.stretches[place].start <= number < trace.stretches[place].end
        kind, row = kind_of.get(event.storage, ("", -1))
        if kind in ("weights", "state") and row in getattr(away, kind):
            continue
        if kind == "gradients" and row in away.gradients:
            if event.size_bytes > 0:
                live[event.storage] = (row, steps[event.storage], event.size_bytes)
            else:
                del live[event.storage]
        else:
            others += event.size_bytes
        now = others
        if inside:
            stretch = trace.stretches[place]
            near = [other for other in trace.stretches[place : place + 2] if other.step == stretch.step]
            near = near if away.ahead else near[:1]
            now += sum(weights[row] for row in {row for other in near for row in other.rows} & away.weights)
            now += sum(size for row, step, size in live.values() if (row, step) in there_then[place])
        most = max(most, now)
    return most


def there(trace: PlacedTrace, place: int, row: int, step: int, ahead: bool) -> bool:
    """Whether the gradient of a row, once it was made, is on the device in a stretch."""
    stretch = trace.stretches[place]
    if stretch.step != step:
        return False
    passes = [n for n, other in enumerate(trace.stretches) if (other.step, other.micro_batch) == (step, stretch.micro_batch)]
    turn = next(n for n in passes if trace.stretches[n].turning)
    own = [n for n in passes if trace.stretches[n].backward and row in trace.stretches[n].rows]
    first = turn if trace.rows[row].last else own[0] if own else passes[-1]
    last = passes[-1] if trace.rows[row].first else first
    return max(first - ahead, turn) <= place <= last + ahead


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize(("name", "recompute"), [("llama", False), ("deep", True), ("gemma3_text", False)])
def test_the_peak_is_that_of_walking_through_the_events(name: str, recompute: bool, ahead: bool) -> None:
    trace = trace_of(name, recompute=recompute)
    some = frozenset(range(0, len(trace.rows), 2))
    for away in (
        Away(ahead=ahead),
        everywhere(trace, "state", "gradients", ahead=ahead),
        everywhere(trace, "state", "gradients", "weights", ahead=ahead),
        Away(state=some, gradients=some, weights=some, ahead=ahead),
    ):
        ledger = trace.placed(away)
        assert ledger.peak().total_bytes == trace.peak_bytes(away) == walked(trace, away)
        assert replay(ledger).requested.total_bytes == trace.peak_bytes(away)  # which refuses what comes twice or never came


@pytest.mark.parametrize("name", list(MODELS))
def test_everything_is_found_and_what_is_left_is_in_no_row(name: str) -> None:
    """With all elsewhere, what is alive after the last step is what no row has: the last norm, and numbers of the optimizer."""
    trace = trace_of(name)
    assert [len(owned.weights) for owned in trace.owned] == [len(row.trained) for row in trace.rows]
    for row, owned in zip(trace.rows, trace.owned, strict=True):
        assert [len(owned.gradients[step]) for step in (1, 2)] == [len(row.trained)] * 2
        assert len(owned.state) == 2 * len(row.trained)
    left = trace.placed(everywhere(trace, "state", "gradients", "weights"))
    alive: dict[str, int] = dict.fromkeys(KINDS, 0)
    for event in left.events:
        alive[left.kinds.get(event.storage, "activations")] += event.size_bytes
    norm = 4 * COMMON["hidden_size"]
    buffers = alive["weights"] - norm
    assert 0 <= buffers < 1024, "rotary frequencies"
    assert alive["gradients"] == 0
    assert 2 * norm <= alive["optimizer"] < 2 * norm + 4096, "and the steps that AdamW counts"


def test_every_row_is_at_work_twice_a_micro_batch() -> None:
    trace = trace_of("deep")
    blocks = [number for number, row in enumerate(trace.rows) if row.unit >= 0]
    for step in (1, 2):
        for micro_batch in (0, 1):
            passes = [s for s in trace.stretches if (s.step, s.micro_batch) == (step, micro_batch)]
            order = [row for stretch in passes for row in stretch.rows if row in blocks]
            assert order == blocks + blocks[::-1]
            assert sum(stretch.turning for stretch in passes) == 1


def test_activations_leave_and_come_back_once() -> None:
    trace = trace_of("deep")
    away = everywhere(trace, "activations")
    plain, placed = trace.ledger, trace.placed(away)
    assert placed.peak().total_bytes < plain.peak().total_bytes
    assert sum(event.size_bytes for event in placed.events) == sum(event.size_bytes for event in plain.events)
    replay(placed)
    moved = trace.offloaded_bytes(away)
    assert len(moved) == sum(row.unit >= 0 for row in trace.rows) - 2, "the last two blocks' are needed at once"
    queued = everywhere(trace, "activations", in_flight_bytes=2 * max(moved.values()))
    assert trace.peak_bytes(away) <= trace.peak_bytes(queued) <= plain.peak().total_bytes
    late = [event for event in trace.placed(queued).events if event.size_bytes < 0]
    assert late != [event for event in placed.events if event.size_bytes < 0], "what leaves is there for longer"


def test_frozen_weights_come_and_go_as_well() -> None:
    trace = trace_of("llama", method="lora")
    away = everywhere(trace, "weights", "state", "gradients")
    assert trace.peak_bytes(away) == walked(trace, away) < trace.ledger.peak().total_bytes
