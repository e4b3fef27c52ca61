"""The replay of glibc's malloc: against the real one, event by event, and the rules that matter one by one."""

from __future__ import annotations

import platform
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sartor.machine.heap import TRIM_THRESHOLD, mmap_threshold
from sartor.predict.heap import COMPANIONS, HEADERS, PER_NODE, HeapConfig, Malloc, forecast_heap, repeat_last_step, replay_heap
from sartor.predict.heap_state import _chunks, process_heap
from sartor.predict.ledger import Event, Ledger
from sartor.predict.operations import Operations, Segment
from sartor.predict.tracker import StorageTracker

MIB = 2**20

_PROGRAM = r"""
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
static void *take(size_t size) { return mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }
int main(int count, char **arguments) {
  long n = atol(arguments[1]);  /* events on stdin: storage, bytes (negative: free); out: arena, mapped, after each */
  long *events = take(n * 16), *out = take(n * 16);
  void **made = take(n * 8);
  setvbuf(stdin, 0, _IONBF, 0); setvbuf(stdout, 0, _IONBF, 0);
  if (fread(events, 16, n, stdin) != (size_t)n) return 1;
  void *volatile first = malloc(2000); free(first);
  for (long i = 0; i < n; i++) {
    long key = events[2 * i], size = events[2 * i + 1];
    if (size < 0) free(made[key]);
    else if (posix_memalign(&made[key], 64, size) == 0) memset(made[key], 1, size);
    struct mallinfo2 now = mallinfo2();
    out[2 * i] = now.arena; out[2 * i + 1] = now.hblkhd;
  }
  return fwrite(out, 16, n, stdout) != (size_t)n;
}
"""


@pytest.fixture(scope="module")
def real_malloc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or compiler is None:
        pytest.skip("needs glibc and a C compiler")
    program = tmp_path_factory.mktemp("malloc") / "replay"
    source = program.with_suffix(".c")
    source.write_text(_PROGRAM, encoding="ascii")
    subprocess.run([compiler, "-O1", "-o", program, source], check=True, capture_output=True)
    return program


def _stream(seed: int, events: int, least: int, most: int) -> list[Event]:
    """A few sizes often, as tensors have, others in between; freed young or old."""
    source, result = random.Random(seed), []
    live: list[tuple[int, int]] = []
    sizes = [int(least * (most / least) ** source.random()) for _ in range(12)]
    for number in range(events):
        if live and source.random() < 0.49:
            storage, size = live.pop(source.randrange(len(live)) if source.random() < 0.5 else -1)
            result.append(Event(storage=storage, size_bytes=-size, phase="step 1: x"))
        else:
            size = source.choice(sizes) if source.random() < 0.8 else int(least * (most / least) ** source.random())
            live.append((number, size))
            result.append(Event(storage=number, size_bytes=size, phase="step 1: x"))
    return result


@pytest.mark.parametrize(
    ("events", "least", "most", "kept"),
    [
        (4000, 64, 2_000_000, False),
        (3000, 1000, 100_000, False),
        (2000, 10_000, 20_000_000, False),
        (300, 1_000_000, 60_000_000, False),
        (300, 1_000_000, 60_000_000, True),
    ],
)
def test_heap_grows_and_shrinks_as_the_real_one(real_malloc: Path, events: int, least: int, most: int, kept: bool) -> None:
    """`kept`: with the thresholds that training sets."""
    config, said = HeapConfig(), {}
    if kept:
        config = HeapConfig(mmap_threshold_bytes=mmap_threshold(), trim_threshold_bytes=TRIM_THRESHOLD, dynamic=False)
        said = {"MALLOC_MMAP_THRESHOLD_": str(mmap_threshold()), "MALLOC_TRIM_THRESHOLD_": str(TRIM_THRESHOLD)}
    stream = _stream(events, events, least, most)
    given_events = b"".join(struct.pack("qq", event.storage, event.size_bytes) for event in stream)
    done = subprocess.run([real_malloc, str(len(stream))], input=given_events, capture_output=True, check=True, env=said)
    real = list(struct.iter_unpack("qq", done.stdout))
    heap, chunks, replayed = Malloc(config), {}, []
    for event in stream:
        if event.size_bytes > 0:
            chunks[event.storage] = heap.memalign(event.size_bytes)
        else:
            heap.free(chunks.pop(event.storage))
        replayed.append((heap.arena_bytes, heap.mapped_bytes))
    if platform.libc_ver()[1] == "2.36":  # the version that was followed
        assert replayed == real
    assert max(map(sum, replayed)) == pytest.approx(max(map(sum, real)), rel=0.02)


def _events(*sizes: int, phase: str = "step 1: x") -> list[Event]:
    """Positive: the next storage; negative: free the storage of that number (from 1)."""
    made: list[int] = []
    result = []
    for size in sizes:
        if size > 0:
            made.append(size)
            result.append(Event(storage=len(made), size_bytes=size, phase=phase))
        else:
            result.append(Event(storage=-size, size_bytes=-made[-size - 1], phase=phase))
    return result


def test_large_storages_have_pages_of_their_own() -> None:
    heap = replay_heap(_events(64 * MIB, 40 * MIB, -1, -2))
    assert 0 <= heap.slack_bytes <= 16384
    assert heap.final_resident_bytes < 16384


def test_freeing_a_mapping_moves_smaller_storages_into_the_heap() -> None:
    apart = replay_heap(_events(4 * MIB, 4 * MIB, 4 * MIB, -2))
    assert apart.final_resident_bytes < 9 * MIB
    # After the first 8 MiB were freed, 4 MiB come from the heap: the hole in its middle stays.
    held = replay_heap(_events(8 * MIB, -1, 4 * MIB, 4 * MIB, 4 * MIB, -3))
    assert held.final_resident_bytes >= 12 * MIB
    fixed = replay_heap(_events(8 * MIB, -1, 4 * MIB, 4 * MIB, 4 * MIB, -3), HeapConfig(dynamic=False))
    assert fixed.final_resident_bytes < 9 * MIB


def test_best_fit_leaves_the_larger_hole() -> None:
    settled = HeapConfig(mmap_threshold_bytes=32 * MIB, trim_threshold_bytes=64 * MIB)
    holes = [3 * MIB, 4096, 2 * MIB, 4096, -1, -3]
    one = replay_heap([*_events(*holes), Event(storage=9, size_bytes=2 * MIB - 4096, phase="x")], settled)
    both = replay_heap(
        [
            *_events(*holes),
            *(Event(storage=9 + n, size_bytes=size, phase="x") for n, size in enumerate((2 * MIB - 4096, 3 * MIB - 4096))),
        ],
        settled,
    )
    assert one.peak_resident_bytes == both.peak_resident_bytes


def test_free_chunks_of_the_process_are_used_first() -> None:
    settled = HeapConfig(mmap_threshold_bytes=32 * MIB, free_chunks=(4 * MIB,))
    assert replay_heap(_events(3 * MIB), settled).peak_resident_bytes < 4096 * 2
    assert replay_heap(_events(5 * MIB), settled).peak_resident_bytes >= 5 * MIB


def _steps(count: int, blocks: int) -> list[Event]:
    """Steps whose blocks make two temporaries and one storage for the backward pass each."""
    events, storage = [], 0
    for number in range(count):
        phase, kept = f"step {number + 1}: x", []
        for _ in range(blocks):
            sizes = {storage: 900_000, storage + 1: 2_500_000, storage + 2: 1_200_000}
            events += [Event(storage=key, size_bytes=size, phase=phase) for key, size in sizes.items()]
            events += [Event(storage=key, size_bytes=-sizes[key], phase=phase) for key in (storage, storage + 1)]
            kept.append(storage + 2)
            storage += 3
        for key in reversed(kept):
            events.append(Event(storage=storage, size_bytes=700_000, phase=phase))
            events.append(Event(storage=key, size_bytes=-1_200_000, phase=phase))
            events.append(Event(storage=storage, size_bytes=-700_000, phase=phase))
            storage += 1
    return events


def test_small_objects_between_storages_hold_the_heap_apart() -> None:
    settled = HeapConfig(mmap_threshold_bytes=32 * MIB, trim_threshold_bytes=64 * MIB)
    events = _steps(4, blocks=30)
    alone = replay_heap(events, settled)
    assert alone.peak_live_bytes < alone.peak_resident_bytes
    for seed in range(3):
        assert replay_heap(events, settled, seed=seed).peak_resident_bytes > 1.2 * alone.peak_resident_bytes


def _small_requests(monkeypatch: pytest.MonkeyPatch, events: list[Event]) -> list[int]:
    asked: list[int] = []
    malloc = Malloc.malloc
    monkeypatch.setattr(Malloc, "malloc", lambda heap, size: asked.append(size) or malloc(heap, size))
    replay_heap(events, seed=1)
    return asked


def test_companions_follow_how_long_a_storage_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 400
    build = [Event(storage=n, size_bytes=4096, phase="build") for n in range(count)]
    assert len(_small_requests(monkeypatch, build)) == sum(HEADERS.values()) * count
    passing = []
    for n in range(count):
        passing += [Event(storage=n, size_bytes=size, phase="step 1: x") for size in (4096, -4096)]
    kept = [Event(storage=n, size_bytes=4096, phase="step 1: x") for n in range(count)]
    kept += [Event(storage=n, size_bytes=-4096, phase="step 1: x") for n in range(count)]
    for events, least in ((passing, 1), (kept, 100)):
        with monkeypatch.context() as patch:
            asked = len(_small_requests(patch, events)) / count
        share = 1 if least == 1 else 0.75  # the last hundred do not outlive a hundred others
        lower = 0 if least == 1 else 0.25 * sum(COMPANIONS[10].values())
        assert asked == pytest.approx(share * sum(COMPANIONS[least].values()) + lower, rel=0.05)


def test_small_objects_are_as_many_as_autograds_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [Event(storage=n, size_bytes=4096, phase="step 1: x") for n in range(400)]  # all wait for a backward pass
    malloc = Malloc.malloc
    for nodes in (0, 400, 1600):
        made = Segment(phase="step 1: x", kind="forward", unit=1, micro_batch=0, times=4, recorded=nodes // 4)
        asked: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(Malloc, "malloc", lambda heap, size, asked=asked: asked.append(size) or malloc(heap, size))
            forecast_heap(Ledger(events=events, operations=Operations(segments=[made])), steps=2)
        beside = sum(HEADERS.values()) + PER_NODE * nodes / 400 if nodes else sum(COMPANIONS[100].values())
        assert len(asked) / 3 / 400 == pytest.approx(beside, rel=0.05)


def test_tracker_counts_what_autograd_records() -> None:
    frozen, trained = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    frozen.requires_grad_(False)
    with StorageTracker() as tracker:
        tracker.begin("step 1: forward and backward")
        hidden = frozen(torch.ones(3, 8))  # nothing to record
        trained(hidden).square().sum()  # transposed, multiplied, squared, summed
        with torch.no_grad():
            trained(hidden)
    assert tracker.ledger.operations.nodes("forward") == 4


def test_a_replay_is_the_same_twice() -> None:
    events = _stream(3, 400, 2000, 3_000_000)
    assert replay_heap(events, seed=4) == replay_heap(events, seed=4)


@given(st.integers(0, 1000))
def test_resident_is_never_below_live(seed: int) -> None:
    stream = _stream(seed, 60, 2000, 3_000_000)
    alive = {event.storage: event.size_bytes for event in stream if event.size_bytes > 0}
    for event in stream:
        if event.size_bytes < 0:
            del alive[event.storage]
    stream += [Event(storage=storage, size_bytes=-size, phase="end") for storage, size in alive.items()]
    heap = replay_heap(stream)
    assert heap.peak_resident_bytes >= heap.peak_live_bytes
    assert heap.final_resident_bytes <= heap.peak_resident_bytes


def test_the_last_step_is_repeated_with_storages_of_its_own() -> None:
    build = [Event(storage=0, size_bytes=100, phase="build")]
    first = [Event(storage=1, size_bytes=50, phase="step 1: x"), Event(storage=2, size_bytes=7, phase="step 1: x")]
    second = [
        Event(storage=3, size_bytes=50, phase="step 2: x"),
        Event(storage=1, size_bytes=-50, phase="step 2: x"),  # what step 1 left behind; step 3 frees what step 2 left
    ]
    events = repeat_last_step([*build, *first, *second], times=2)
    live: dict[int, int] = {}
    for event in events:
        if event.size_bytes > 0:
            assert event.storage not in live
            live[event.storage] = event.size_bytes
        else:
            assert live.pop(event.storage) == -event.size_bytes
    assert len(events) == 3 + 2 + 4
    assert sorted(live.values()) == [7, 50, 100]


def test_forecast_says_where_the_peak_is() -> None:
    ledger = Ledger(events=[*_events(MIB, 2 * MIB), *(Event(storage=9, size_bytes=MIB, phase="step 2: forward and backward"),)])
    heap = forecast_heap(ledger)
    assert heap.phase == "step 2: forward and backward"
    assert heap.peak_live_bytes >= 4 * MIB


def test_state_of_this_process() -> None:
    info = '<heap nr="0"><size from="17" to="32" total="64" count="2"/><size from="2065" to="3025" total="8003" count="3"/>'
    info += '<unsorted from="5009" to="5009" total="5009" count="1"/></heap><heap><size from="33" to="33" total="33" count="1"/>'
    assert _chunks(info) == [32, 32, 2064, 2912, 3024, 5008]
    config = process_heap()
    assert config.mmap_threshold_bytes == config.mmap_threshold_max_bytes
    assert all(size >= 32 and size % 16 == 0 for size in config.free_chunks)
    if platform.libc_ver()[0] == "glibc":
        assert config.free_chunks
