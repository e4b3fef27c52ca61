"""Memory as this process may use it: the machine's, less what control groups and resource limits take away."""

from __future__ import annotations

import contextlib
import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path

import psutil

from sartor.machine.cgroup import memory_limits
from sartor.machine.topology import ROOT, parse_list, read_text


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes of main memory: what this process could have at most, and what it can still take now."""

    total_bytes: int
    available_bytes: int


def host_memory() -> HostMemory:
    """The tightest of physical memory, control groups, the NUMA nodes this process is bound to, and `ulimit`."""
    virtual = psutil.virtual_memory()
    total, available = virtual.total, virtual.available
    for limit, used in [*memory_limits(), *node_limits(), *_resource_limits()]:
        total = min(total, limit)
        available = min(available, max(limit - used, 0))
    return HostMemory(total_bytes=total, available_bytes=available)


def resident_bytes() -> int:
    """What this process holds in main memory now."""
    return int(psutil.Process().memory_info().rss)


def reset_peak_resident() -> bool:
    """Start a new high-water mark of resident memory; False where the system cannot (then the mark is the process's)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int:
    """The high-water mark of resident memory since the last reset (Linux), else since the process began."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def resident_shared_bytes() -> int:
    """What this process has touched of memory that it shares with others, a part of `resident_bytes` (Linux, else 0)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssShmem:"):
                return int(line.split()[1]) * 1024
    return 0


def node_limits(root: Path = ROOT) -> list[tuple[int, int]]:
    """(limit, used) of the NUMA nodes that this process is bound to, where they are not all there are."""
    allowed = parse_list(dict(line.split(":\t", 1) for line in _status(root) if ":\t" in line).get("Mems_allowed_list", ""))
    nodes = root / "sys/devices/system/node"
    if not allowed or not set(parse_list(read_text(nodes / "online"))) - set(allowed):
        return []
    sizes = [
        re.findall(r"(MemTotal|MemFree|Inactive\(file\)):\s+(\d+) kB", read_text(nodes / f"node{n}/meminfo")) for n in allowed
    ]
    total = sum(int(size) for words in sizes for name, size in words if name == "MemTotal")
    free = sum(int(size) for words in sizes for name, size in words if name != "MemTotal")
    return [(total * 1024, (total - free) * 1024)] if total else []


def _status(root: Path) -> list[str]:
    return read_text(root / "proc/self/status").splitlines()


def _resource_limits() -> list[tuple[int, int]]:
    memory = psutil.Process().memory_info()
    used = {resource.RLIMIT_AS: memory.vms, resource.RLIMIT_DATA: getattr(memory, "data", memory.rss)}
    limits = [(resource.getrlimit(kind)[0], used_bytes) for kind, used_bytes in used.items()]
    return [(limit, used_bytes) for limit, used_bytes in limits if limit != resource.RLIM_INFINITY]
