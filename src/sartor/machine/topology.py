"""How this machine is built: sockets, cores, caches, NUMA nodes and what kind of memory is theirs. Read from Linux's sysfs.

Every function takes the root of the file system, so that another machine's files can be read as well as this one's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
_CPUS = "sys/devices/system/cpu"
_NODES = "sys/devices/system/node"
_HBM_PER_SOCKET_BYTES = 64 * 2**30
"""Of Intel Xeon CPU Max: https://www.intel.com/content/www/us/en/products/details/processors/xeon/max-series.html"""


@dataclass(frozen=True, kw_only=True)
class NumaNode:
    """A part of the memory and the processors next to it."""

    node: int
    cpus: tuple[int, ...]
    """None where the node is memory alone."""
    memory_bytes: int
    hbm: bool = False
    """High-bandwidth memory that is addressed as memory of its own."""
    distances: tuple[int, ...] = ()
    """To all nodes in their order, 10 to itself, as the firmware says."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """One kind of cache; `instances` of it, each shared by `shared_by` logical processors."""

    level: int
    kind: str
    """data, instruction or unified."""
    size_bytes: int
    shared_by: int
    instances: int


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The whole machine, whatever part of it a process may use."""

    sockets: int
    physical_cores: int
    logical_cores: int
    nodes: tuple[NumaNode, ...]
    caches: tuple[Cache, ...]
    hbm_mode: str = ""
    """Of a processor with high-bandwidth memory: flat (nodes of its own), cache (of the other memory), only (no other memory)."""

    @property
    def hbm_bytes(self) -> int:
        """Addressable high-bandwidth memory."""
        return sum(node.memory_bytes for node in self.nodes if node.hbm)


def read_topology(cpu_name: str = "", root: Path = ROOT) -> Topology | None:
    """From sysfs; None where there is none (macOS). `cpu_name` tells what sysfs does not: processors that have HBM."""
    online = parse_list(read_text(root / _CPUS / "online"))
    if not online:
        return None
    cores = physical_cores(online, root)
    packages = {read_text(root / _CPUS / f"cpu{core[0]}/topology/physical_package_id") or "0" for core in cores}
    nodes = _nodes(root / _NODES, online)
    has_hbm = re.search(r"xeon.*\bmax\b", cpu_name, re.IGNORECASE) is not None
    nodes, mode = _with_hbm(nodes, root / _NODES, sockets=len(packages), has_hbm=has_hbm)
    return Topology(
        sockets=len(packages),
        physical_cores=len(cores),
        logical_cores=len(online),
        nodes=nodes,
        caches=_caches(root, online),
        hbm_mode=mode,
    )


def physical_cores(cpus: Iterable[int], root: Path = ROOT) -> set[tuple[int, ...]]:
    """The cores that these logical processors are on, each as all of its logical processors."""
    cores: set[tuple[int, ...]] = set()
    seen: set[int] = set()
    for cpu in cpus:
        if cpu not in seen:
            topology = root / _CPUS / f"cpu{cpu}/topology"
            siblings = parse_list(read_text(topology / "core_cpus_list") or read_text(topology / "thread_siblings_list")) or (
                cpu,
            )
            cores.add(siblings)
            seen.update(siblings)
    return cores


def clusters(topology: Topology | None, usable: Collection[int]) -> tuple[tuple[NumaNode, tuple[int, ...]], ...]:
    """NUMA nodes that have processors which this process may use, each with these; none where the machine is not known or has a
    single one."""
    nodes = topology.nodes if topology is not None else ()
    found = [(node, tuple(cpu for cpu in node.cpus if cpu in usable)) for node in nodes]
    used = tuple((node, cpus) for node, cpus in found if cpus)
    return used if len(used) > 1 else ()


def parse_list(text: str) -> tuple[int, ...]:
    """Numbers of the kernel's lists: `0-3,8` is 0, 1, 2, 3, 8. None for what is not such a list."""
    numbers: list[int] = []
    for part in text.strip().split(",") if text.strip() else []:
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            return ()
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def _caches(root: Path, online: tuple[int, ...]) -> tuple[Cache, ...]:
    """Read at one processor of each kind (performance and efficiency cores differ) and counted up."""
    kinds = [parse_list(read_text(root / f"sys/devices/cpu_{kind}/cpus")) for kind in ("core", "atom")]
    groups = [group for group in kinds if group] or [online]
    found: dict[tuple[int, str, int, int], int] = {}
    for group in groups:
        folder = root / _CPUS / f"cpu{group[0]}/cache"
        for index in sorted(folder.glob("index[0-9]*")):
            size, level = _size(read_text(index / "size")), read_text(index / "level")
            shared = parse_list(read_text(index / "shared_cpu_list")) or (group[0],)
            if not size or not level.isdigit():
                continue
            key = (int(level), (read_text(index / "type") or "unified").lower(), size, len(shared))
            # A cache that both kinds of cores share is seen from both, and counted once.
            own = set(shared) <= set(group)
            found[key] = (found.get(key, 0) if own else 0) + -(-len(group if own else online) // len(shared))
    return tuple(
        Cache(level=level, kind=kind, size_bytes=size, shared_by=shared_by, instances=count)
        for (level, kind, size, shared_by), count in sorted(found.items())
    )


def _nodes(folder: Path, online: tuple[int, ...]) -> tuple[NumaNode, ...]:
    nodes = []
    for number in parse_list(read_text(folder / "online")):
        place = folder / f"node{number}"
        total = re.search(r"MemTotal:\s+(\d+) kB", read_text(place / "meminfo"))
        cpus = tuple(cpu for cpu in parse_list(read_text(place / "cpulist")) if cpu in set(online))
        distances = tuple(int(word) for word in read_text(place / "distance").split() if word.isdigit())
        nodes.append(NumaNode(node=number, cpus=cpus, memory_bytes=int(total[1]) * 1024 if total else 0, distances=distances))
    return tuple(nodes)


def _with_hbm(nodes: tuple[NumaNode, ...], folder: Path, *, sockets: int, has_hbm: bool) -> tuple[tuple[NumaNode, ...], str]:
    """The nodes with high-bandwidth memory marked, and the mode of that memory.

    Memory without processors may be HBM, or slower memory behind a link (CXL, persistent): the firmware's bandwidths tell,
    and where it gives none, the processor's name.
    """
    with_cpus = [node for node in nodes if node.cpus]
    beside = max((_bandwidth(folder, node.node) for node in with_cpus), default=0)
    fast: set[int] = set()
    for node in nodes:
        if not node.cpus and node.memory_bytes:
            own = _bandwidth(folder, node.node)
            if own > beside > 0 or (has_hbm and not (own and beside)):
                fast.add(node.node)
    if fast:
        return _marked(nodes, fast), "flat"
    if any(_size(read_text(path)) for path in folder.glob("node[0-9]*/memory_side_cache/index*/size")):
        return nodes, "cache"
    total = sum(node.memory_bytes for node in with_cpus)
    if has_hbm and total <= sockets * _HBM_PER_SOCKET_BYTES:
        return _marked(nodes, {node.node for node in with_cpus}), "only"
    return nodes, "cache" if has_hbm else ""


def _marked(nodes: tuple[NumaNode, ...], fast: set[int]) -> tuple[NumaNode, ...]:
    return tuple(
        NumaNode(node=node.node, cpus=node.cpus, memory_bytes=node.memory_bytes, hbm=node.node in fast, distances=node.distances)
        for node in nodes
    )


def _bandwidth(folder: Path, node: int) -> int:
    """MB/s from the nearest processors, where the firmware has a table of it (HMAT)."""
    return read_number(folder / f"node{node}/access0/initiators/read_bandwidth") or 0


def _size(text: str) -> int:
    """Bytes of `48K`, `2048K`, `32M`, or of a bare number."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    return int(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[match[2]] if match else 0


def read_text(path: Path) -> str:
    """A file's words; an empty string where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def read_number(path: Path) -> int | None:
    """A file's number; None where it holds another thing (`max`, -1) or cannot be read."""
    text = read_text(path)
    return int(text) if text.isdigit() else None
