"""The disk tier and the states of chunks."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from sartor.errors import RunError, StorageError
from sartor.placement.chunk import Change, Chunk, Gauge, IllegalTransition
from sartor.placement.pinned import PinnedTier
from sartor.placement.tiers import DiskTier, Mover, in_memory


def chunk_of(tmp_path: Path, size: int = 5000) -> tuple[Chunk, torch.Tensor]:
    tensor = torch.arange(size, dtype=torch.float32)
    chunk = Chunk("block weights", DiskTier(tmp_path), Mover(), Gauge())
    chunk.adopt([tensor])
    return chunk, tensor


def test_what_was_stored_comes_back_into_the_same_tensor(tmp_path: Path) -> None:
    chunk, tensor = chunk_of(tmp_path, 3_000_001)  # more than one span, and no whole number of pages
    changes: list[Change] = []
    chunk._gauge.say = changes.append
    view = tensor[2:].view(1, -1)
    chunk.store()
    chunk._mover.settle()
    assert tensor.untyped_storage().nbytes() == 0
    assert not list(tmp_path.iterdir()), "the file has no name"
    chunk.hold()
    assert torch.equal(view[0], torch.arange(2, 3_000_001, dtype=torch.float32))
    assert [change.state for change in changes] == ["leaving", "free", "coming", "hold"]
    assert "11.4 MiB" in changes[-1].describe()


def test_parts_and_the_whole_can_be_written_in_turn(tmp_path: Path) -> None:
    """Each piece has a sum; those of other cuts are forgotten."""
    chunk, tensor = chunk_of(tmp_path, 4096)
    chunk.store()
    chunk._mover.settle()
    for number in range(4):
        assert torch.equal(chunk.read_part(tensor, 1024, 1024), torch.arange(1024, 2048) + 0.5 * number)
        chunk.write_part(tensor, 1024, torch.arange(1024, 2048) + 0.5 * number + 0.25)
        chunk.hold()
        assert torch.equal(tensor[1024:2048], torch.arange(1024, 2048) + 0.5 * number + 0.25)
        tensor += 0.25
        chunk.store()
        chunk._mover.settle()


def test_what_is_wanted_again_while_it_leaves_stays(tmp_path: Path) -> None:
    chunk, tensor = chunk_of(tmp_path)
    chunk.store()
    chunk.hold()
    chunk._mover.settle()
    assert chunk.here
    assert torch.equal(tensor, torch.arange(5000, dtype=torch.float32))


def test_illegal_transitions_are_errors(tmp_path: Path) -> None:
    chunk, _ = chunk_of(tmp_path)
    chunk.begin()
    with pytest.raises(IllegalTransition, match="compute"):
        chunk.drop()


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EIO, "another disk")])
def test_a_disk_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    chunk, _ = chunk_of(tmp_path)

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", fail)
    chunk.store()
    with pytest.raises(RunError) as caught:
        chunk._mover.settle()
    assert words in str(caught.value)
    assert "last checkpoint" in caught.value.remedy


@pytest.mark.parametrize(("damage", "words"), [("changed", "not what was written"), ("cut", "bytes came back")])
def test_a_damaged_file_is_noticed(tmp_path: Path, damage: str, words: str) -> None:
    chunk, _ = chunk_of(tmp_path)
    chunk.store()
    chunk._mover.settle()
    assert isinstance(chunk.tier, DiskTier)
    with Path(f"/proc/self/fd/{chunk.tier._descriptor}").open("r+b") as file:
        if damage == "cut":
            file.truncate(4096)
        else:
            file.seek(5000)
            file.write(b"?")
    with pytest.raises(StorageError, match=words) as caught:
        chunk.hold()
    assert "last checkpoint" in caught.value.remedy
    assert chunk.state == "free"


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="left"):
        DiskTier(tmp_path).require(2**60)


def test_folders_in_memory_are_known(tmp_path: Path) -> None:
    if Path("/dev/shm").is_dir():
        assert in_memory(Path("/dev/shm"))
    assert in_memory(Path("/proc/self/no-such-folder")) is False


class NotedLocks(PinnedTier):
    """Notes what a driver would be asked to lock and unlock."""

    def __init__(self, *, grants: bool = True) -> None:
        super().__init__(torch.device("cuda", 0))
        self.grants, self.locked = grants, dict[int, int]()

    def _page_lock(self, slab: torch.Tensor) -> bool:
        self.locked[slab.data_ptr()] = slab.nbytes
        return self.grants

    def _page_unlock(self, slab: torch.Tensor) -> None:
        del self.locked[slab.data_ptr()]


def test_main_memory_is_locked_exactly_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    tier = NotedLocks()
    first, second = tier.allocate(100_000), tier.allocate(3_000_001)
    assert sorted(tier.locked.values()) == [100_000, 3_000_001]
    tier.view(first).fill_(1)
    tier.view(second).fill_(2)
    assert int(tier.view(first).sum()) == 100_000
    tier.free(first)
    again = tier.allocate(95_000)
    assert tier.view(again).data_ptr() == tier.view(again).untyped_storage().data_ptr()
    assert len(tier.locked) == 2, "a little less has the same place"
    assert tier.view(again).nbytes == 95_000
    assert tier.used_bytes == 3_095_001
    tier.free(again)
    assert not waited
    third = tier.allocate(50_000)
    assert waited, "before memory is unlocked, copies of it are over"
    assert sorted(tier.locked.values()) == [50_000, 3_000_001], "holes that are too large go before more is locked"
    tier.free(third)
    tier.close()
    assert not tier.locked
    assert tier.cost == ""
    refused = NotedLocks(grants=False)
    refused.allocate(1)
    assert "cudaHostRegister" in refused.cost
