"""The arena of a real process against its replay: to the byte; what it holds stays what it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from sartor.kernels import arena
from sartor.predict.arena import Arena, takes

pytestmark = pytest.mark.skipif(not arena.usable(), reason="needs Linux and a C++ compiler")

_PROGRAM = """
import json, random, resource, sys
import torch
from sartor.kernels import arena

early = torch.full((100_000,), 7.0)
assert arena.use() and arena.use()
source, held, tops = random.Random(int(sys.argv[1])), {}, []
for number in range(400):
    if held and source.random() < 0.45:
        name = source.choice(list(held))
        tensor, value = held.pop(name)
        assert (tensor.numpy() == value).all(), name
        del tensor
    else:
        size = int(2 ** source.uniform(10, 22))
        held[number] = torch.full((size,), number % 251, dtype=torch.uint8), number % 251
    tops.append(arena.top_bytes())
del early
tensor, storage = held.popitem()[1][0], None
tensor.untyped_storage().resize_(0)
tensor.untyped_storage().resize_(1 << 20)
tensor.fill_(3)
assert all((tensor.numpy() == value).all() for tensor, value in held.values())
arena.give_back()
assert all((tensor.numpy() == value).all() for tensor, value in held.values())
resource.setrlimit(resource.RLIMIT_DATA, (1 << 28, resource.RLIM_INFINITY))
try:
    torch.empty(1 << 32, dtype=torch.uint8)
except RuntimeError as error:
    assert "allocate memory" in str(error), error
else:
    raise AssertionError("there is no such memory")
print(json.dumps(tops))
"""


def _run(seed: int, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(seed)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def _replayed(seed: int) -> list[int]:
    """The same requests as the program's, through the replay."""
    import random

    source, replay, held, tops = random.Random(seed), Arena(), dict[int, Any](), []
    for number in range(400):
        if held and source.random() < 0.45:
            block = held.pop(source.choice(list(held)))
            if block is not None:
                replay.give(block)
        else:
            size = int(2 ** source.uniform(10, 22))
            held[number] = replay.take(size) if takes(size) else None
        tops.append(replay.top_bytes)
    return tops


def test_the_replay_is_exact_and_tensors_keep_their_content() -> None:
    done = _run(0)
    assert done.returncode == 0, done.stderr
    tops = json.loads(done.stdout)
    assert tops == _replayed(0)
    assert tops[-1] > 2**22


def test_neighbours_are_joined_and_the_end_is_used_again() -> None:
    replay = Arena()
    first, second, third = (replay.take(1 << 20) for _ in range(3))
    replay.give(first)
    replay.give(third)
    assert replay.take(1 << 21)[0] == second[0] + second[1], "from the free end on"
    assert replay.top_bytes == 4 << 20
    replay.give(second)
    assert replay.take(2 << 20) == (0, 2 << 20), "two neighbours are one block"


@pytest.mark.parametrize("variable", ["MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_"])
def test_what_the_user_said_of_malloc_stays(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "65536")
    assert not arena.usable()
    assert not arena.use()
