"""Memory as this process may use it: the machine's, less what control groups and resource limits take away."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes of main memory: what this process could have at most, and what it can still take now."""

    total_bytes: int
    available_bytes: int


def host_memory() -> HostMemory:
    """The tightest of physical memory, the control group (v2) and `ulimit` (address space, data segment)."""
    virtual = psutil.virtual_memory()
    total, available = virtual.total, virtual.available
    for limit, used in [*_cgroup_limits(), *_resource_limits()]:
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


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, used) of this process's control group and of every group above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    relative = next((line[3:] for line in lines if line.startswith("0::")), None)
    if relative is None:
        return []
    limits = []
    group = _CGROUPS / relative.strip("/")
    while group == _CGROUPS or _CGROUPS in group.parents:
        limit, used = _read_int(group / "memory.max"), _read_int(group / "memory.current")
        if limit is not None and used is not None:
            limits.append((limit, used - _reclaimable(group)))
        if group == _CGROUPS:
            break
        group = group.parent
    return limits


def _reclaimable(group: Path) -> int:
    """Page cache that the kernel gives back under pressure."""
    try:
        for line in (group / "memory.stat").read_text(encoding="ascii").splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def _read_int(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _resource_limits() -> list[tuple[int, int]]:
    memory = psutil.Process().memory_info()
    used = {resource.RLIMIT_AS: memory.vms, resource.RLIMIT_DATA: getattr(memory, "data", memory.rss)}
    limits = [(resource.getrlimit(kind)[0], used_bytes) for kind, used_bytes in used.items()]
    return [(limit, used_bytes) for limit, used_bytes in limits if limit != resource.RLIM_INFINITY]
