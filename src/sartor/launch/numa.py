"""Which cores and which memory each process of a run has, and binding it to them."""

from __future__ import annotations

import ctypes
import json
import os
import platform
from collections.abc import Collection
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from sartor.machine.topology import ROOT, NumaNode, Topology, clusters, physical_cores

_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237, "ppc64le": 261, "s390x": 270, "riscv64": 237}
"""System call numbers; the C library has no function for it (libnuma has)."""
_MPOL_DEFAULT, _MPOL_PREFERRED = 0, 1  # linux/mempolicy.h


@dataclass(frozen=True, kw_only=True)
class Place:
    """Logical processors of a process, and the node whose memory it takes before others.

    Without such a node memory comes from where the process runs, which is what Linux does by itself: the first touch decides.
    """

    cpus: tuple[int, ...]
    memory: int | None = None

    def write(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Place:
        tree = json.loads(text)
        return cls(cpus=tuple(tree["cpus"]), memory=tree["memory"])


def places(topology: Topology | None, usable: Collection[int], processes: int, root: Path = ROOT) -> list[Place]:
    """A place for each process: whole NUMA clusters while there are as many, else parts of one; cores are never divided while
    there are enough.

    High-bandwidth memory that is addressed as nodes of its own (flat mode) is preferred by the processes next to it.
    """
    parts = clusters(topology, usable)
    groups = [cpus for _, cpus in parts] or [tuple(sorted(usable))]
    first: list[NumaNode | None] = [*(node for node, _ in parts)] or [None]
    if processes <= len(groups):
        bounds = [len(groups) * number // processes for number in range(processes + 1)]
        joined = [sum(groups[start:end], ()) for start, end in pairwise(bounds)]
        owners = [first[start] for start in bounds[:-1]]
    else:
        joined, owners = [], []
        for number, cpus in enumerate(groups):
            count = processes * (number + 1) // len(groups) - processes * number // len(groups)
            joined += _divided(cpus, count, root)
            owners += [first[number]] * count
    return [Place(cpus=cpus, memory=_fast_memory(topology, node)) for cpus, node in zip(joined, owners, strict=True)]


def bind(place: Place) -> None:
    """This process, with the threads it has, to a place. What the system refuses is left as it is: speed suffers, no result."""
    if not hasattr(os, "sched_setaffinity"):
        return
    for thread in _threads():
        try:
            os.sched_setaffinity(thread, place.cpus)
        except OSError:
            continue
    prefer_memory(place.memory)


def prefer_memory(node: int | None) -> bool:
    """New memory of this thread, and of those it starts, comes from `node` while there is some (None: from where it runs)."""
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None or platform.system() != "Linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if node is None:
        return int(libc.syscall(number, _MPOL_DEFAULT, None, 0)) == 0
    words = node // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    mask[node // 64] = 1 << node % 64
    return int(libc.syscall(number, _MPOL_PREFERRED, mask, 64 * words + 1)) == 0


def _threads() -> list[int]:
    try:
        return [int(path.name) for path in Path("/proc/self/task").iterdir()]
    except OSError:
        return [0]


def _divided(cpus: tuple[int, ...], count: int, root: Path) -> list[tuple[int, ...]]:
    """Processors in so many parts, the logical ones of a core together where there are cores enough."""
    own = set(cpus)
    cores = sorted(tuple(cpu for cpu in core if cpu in own) for core in physical_cores(cpus, root))
    units = cores if len(cores) >= count else [(cpu,) for cpu in cpus]
    bounds = [len(units) * number // count for number in range(count + 1)]
    return [tuple(sorted(sum(units[start:end], ()))) or cpus for start, end in pairwise(bounds)]


def _fast_memory(topology: Topology | None, node: NumaNode | None) -> int | None:
    """The nearest node of high-bandwidth memory that has no processors of its own."""
    if topology is None or topology.hbm_mode != "flat":
        return None
    fast = [(place, other) for place, other in enumerate(topology.nodes) if other.hbm and not other.cpus]
    if node is None or not fast:
        return fast[0][1].node if fast else None

    def distance(entry: tuple[int, NumaNode]) -> int:
        return node.distances[entry[0]] if entry[0] < len(node.distances) else 10**6

    return min(fast, key=distance)[1].node
