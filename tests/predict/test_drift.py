"""Reserved memory while lengths vary: sizes at any shape are exact, put together they are the traced steps, and order matters."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from sartor.job import from_mapping
from sartor.methods import traits
from sartor.model import resolve, skeleton
from sartor.predict import Ledger, trace_steps
from sartor.predict.allocator import AllocatorConfig, replay
from sartor.predict.allocator_setting import expandable_segments
from sartor.predict.drift import Drift, replay_steps, telling_steps
from sartor.predict.ledger import Event
from sartor.predict.shapes import Family, NotComparable, Shape, blank_batch
from sartor.predict.target import Target
from sartor.step import Precision, make_step, make_trainable

A100 = Target(kind="cuda", sm=80)
TRACED = (Shape(4, 512, 300), Shape(4, 389, 123), Shape(3, 251, 200))
OTHER = Shape(2, 333, 99)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that is large enough for the large pool, with grouped keys; planned only."""
    folder = tmp_path_factory.mktemp("config")
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "vocab_size": 8000}
    LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4).save_pretrained(folder)
    return str(Path(folder) / "config.json")


@cache
def traced(config: str, method: str, recompute: bool, packing: bool, accumulated: int, shape: Shape) -> Ledger:
    job = from_mapping({"model": config, "data": "none.jsonl", "method": method, "prompt": {"length": 7}})
    precision = Precision.of("bf16-mixed")
    model = skeleton(resolve(job.model), dtype=precision.load_dtype(adapter=traits(job).adapter))
    model = make_trainable(model, job, precision, recompute=recompute, meta=True, kind=A100.kind)
    batches = [blank_batch(shape, packing=packing)] * accumulated
    return trace_steps(
        model, lambda fake: make_step(fake, job, precision, device_kind="cpu", kind=A100.kind), batches, target=A100
    )


def family(config: str, method: str = "lora", *, recompute: bool = False, packing: bool = False, accumulated: int = 1) -> Family:
    ledgers = [traced(config, method, recompute, packing, accumulated, shape) for shape in TRACED]
    traces = [(shape, A100.with_workspace(ledger)) for shape, ledger in zip(TRACED, ledgers, strict=True)]
    return Family(traces, ledgers[0].kinds, virtual_tokens=7 if method == "prompt" else 0)


CASES = [
    ("lora", False, False, 1),
    ("lora", True, True, 2),
    ("full", False, True, 2),
    ("full", True, False, 2),
    ("prompt", False, False, 2),
]


@pytest.mark.parametrize(("method", "recompute", "packing", "accumulated"), CASES)
def test_a_size_that_was_not_traced_is_exact(config: str, method: str, recompute: bool, packing: bool, accumulated: int) -> None:
    """Sizes, and with them every number of the allocator, at a fourth shape; put together from parts, as a run is."""
    known = family(config, method, recompute=recompute, packing=packing, accumulated=accumulated)
    events = A100.with_workspace(traced(config, method, recompute, packing, accumulated, OTHER))
    assert sorted(known.sizes(OTHER)) == sorted(abs(event.size_bytes) for event in events)
    for expandable in (False, True):
        settings = AllocatorConfig(expandable_segments=expandable)
        together = replay_steps(known, [[OTHER] * accumulated] * 2, settings, accumulated=accumulated)
        whole = replay(events, settings)
        assert together.peak_bytes == whole.reserved.total_bytes
        assert not together.out_of_memory


def drift(known: Family, widths: Sequence[int], **settings: Any) -> Drift:
    return replay_steps(known, [[Shape(4, width, width - 1)] for width in widths], AllocatorConfig(**settings))


def test_reserved_depends_on_the_order_of_lengths(config: str) -> None:
    """The longest first, a mixture, and lengths that rise step by step: the same batches, ever more memory."""
    known, chance = family(config), random.Random(0)
    rising = [*sorted(chance.randint(100, 1000) for _ in range(23)), 1024]
    mixed = chance.sample(rising, len(rising))
    alone = drift(known, [1024] * 2).peak_bytes
    falling, between, worst = (drift(known, order).peak_bytes for order in (rising[::-1], mixed, rising))
    assert falling < 1.05 * alone
    assert falling < between < worst
    assert worst > 1.3 * alone
    held = [drift(known, order, expandable_segments=True).peak_bytes for order in (rising[::-1], mixed, rising)]
    assert max(held) < 1.01 * min(held), "where segments expand, the order hardly matters"
    assert max(held) < 1.05 * drift(known, [1024] * 2, expandable_segments=True).peak_bytes


def test_what_is_reserved_never_shrinks_until_memory_runs_out(config: str) -> None:
    known, rising = family(config), list(range(200, 1001, 50))
    free = drift(known, rising)
    assert len(free.reserved_bytes) == len(rising)
    assert list(free.reserved_bytes) == sorted(free.reserved_bytes)
    assert free.retries == 0
    card = drift(known, [1000]).peak_bytes
    short = drift(known, rising, capacity_bytes=card + card // 20)
    assert short.retries > 0, "the cache is emptied, and the run goes on"
    assert not short.out_of_memory
    tiny = drift(known, rising, capacity_bytes=card // 2)
    assert tiny.out_of_memory
    assert 0 < len(tiny.reserved_bytes) < len(rising)


def test_the_telling_steps_are_the_first_and_the_records() -> None:
    assert telling_steps([5, 4, 3], 10) == [0, 1, 2]
    assert telling_steps([1, 1, 1, 1, 1, 1, 2, 1, 3, 1], 4) == [0, 1, 6, 8]
    assert telling_steps(list(range(1, 101)), 6) == [0, 1, 2, 97, 98, 99]
    assert telling_steps([9, 1, 1, 1, 1, 1, 1, 1], 4) == [0, 1, 2, 3]


def test_traces_that_differ_are_refused() -> None:
    def trace(*sizes: int, storage: int = 0) -> list[Event]:
        return [Event(storage=storage + number, size_bytes=size, phase="step 1: update") for number, size in enumerate(sizes)]

    shapes = (Shape(4, 100, 50), Shape(4, 71, 33), Shape(3, 53, 20))
    grown = Family([(shape, trace(8 * shape.rows * shape.width, 64)) for shape in shapes], {})
    assert grown.sizes(Shape(2, 10, 5)) == [160, 64]
    with pytest.raises(NotComparable, match="number of allocations"):
        Family([(shapes[0], trace(1)), (shapes[1], trace(1, 1)), (shapes[2], trace(1))], {})
    with pytest.raises(NotComparable, match="order of allocations"):
        Family([(shapes[0], trace(1)), (shapes[1], trace(1, storage=3)), (shapes[2], trace(1))], {})
    with pytest.raises(NotComparable, match="not known"):
        Family([(shape, trace(shape.width**3)) for shape in shapes], {})


@pytest.mark.parametrize(
    ("wanted", "environment", "here", "expected"),
    [
        ("auto", "", True, True),
        ("auto", "expandable_segments:False", True, False),
        ("auto", "max_split_size_mb:64,expandable_segments:True", True, True),
        ("auto", "backend:cudaMallocAsync", True, False),
        ("auto", "expandable_segments:False", False, True),
        (False, "expandable_segments:True", True, False),
        (True, "", False, True),
    ],
)
def test_whether_segments_expand(
    monkeypatch: pytest.MonkeyPatch, wanted: Any, environment: str, here: bool, expected: bool
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", environment)
    assert expandable_segments(wanted, "cuda", here=here) is expected
    assert expandable_segments(wanted, "cpu", here=here) is False
